"""Fake quantizers: NIPQ, LSQ and DiffQ, with their bit-widths and starting values.

Start reading in `base.py`, then `nipq.py`. Imports `numerics` and `kernels`.
"""
