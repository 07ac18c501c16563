"""The fake quantizers NIPQ, LSQ and DiffQ, with their bit-widths and initial values.

Start reading in `base.py`, then `nipq.py`. Imports `numerics` and `kernels`.
"""
