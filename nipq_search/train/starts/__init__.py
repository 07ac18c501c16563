"""Starting values of bit-widths: from the budget, a parent, one width or sensitivity scores.

Imports no other part of `train`.
"""
