"""Entry point of `python -m nipq_search.cli`, equivalent to the script `nipq-search`."""

from nipq_search.cli import main

raise SystemExit(main())
