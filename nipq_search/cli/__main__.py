"""`python -m nipq_search.cli` is `nipq-search`, also where no script was installed."""

from nipq_search.cli import main

raise SystemExit(main())
