"""What to try next: budgets and parents of trials, samplers, the front.

Start reading in `strategies.py` (which budget, which parent) and `samplers.py` (the other
hyperparameters); the rest are pure functions on points and trials. Imports no other part of the
search.
"""
