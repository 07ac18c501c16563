"""Methods that reduce oscillation of weights: averaging, iterative freezing, dampening.

Each file contains one method; `oscillation.py` also measures the share of oscillating weights.
Imports no other part of `train`.
"""
