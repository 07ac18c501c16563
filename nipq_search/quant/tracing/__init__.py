"""What a model computes: its multiplications, found by following one forward.

Start reading in `trace.py`; `ops.py` lists the functions that multiply, `roles.py` decides what is
a weight and what an activation, `sites.py` quantizes a multiplication where it stands. Imports
`quantizers` and what is below them.
"""
