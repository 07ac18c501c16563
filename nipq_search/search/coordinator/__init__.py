"""The order of jobs, and what a finished job means for the study. Starts no processes.

Start reading in `coordinator.py`. `trials.py` starts and ends trials, and `history.py` is the
strategy's view of them. `resolved.py` computes what a configuration implies before training: the
graph, absolute budgets and axes. Imports `jobs`, `strategies`, `config` and `study`.
"""
