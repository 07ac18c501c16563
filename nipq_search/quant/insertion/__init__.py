"""Conversion of a float model into a prepared one: placement of quantizers and shared bit-widths.

Start reading in `prepare.py`, then `build.py`. Imports `config`, `graph`, `tracing` and the
packages below them.
"""
