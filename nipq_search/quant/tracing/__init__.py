"""Multiplications of a model and their operands, found by tracing one forward pass.

Start reading in `trace.py`; `ops.py` lists the functions that multiply, `roles.py` classifies
operands as weights or activations, and `sites.py` quantizes multiplications in place. Imports
`quantizers` and the packages below it.
"""
