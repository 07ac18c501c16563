"""From a float model to a prepared one: where quantizers go, and which share bits.

Start reading in `prepare.py`, then `build.py`. Imports `config`, `graph`, `tracing` and what is
below them.
"""
