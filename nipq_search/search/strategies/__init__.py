"""Selection of trials: budgets and parents, samplers, and the Pareto front.

Start reading in `strategies.py`, which assigns budgets and parents, and in `samplers.py`, which
proposes the other hyperparameters. The remaining files contain helpers that operate on points and
trials. Imports no other package of the search.
"""
