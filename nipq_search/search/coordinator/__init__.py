"""The order of jobs, and the effect of finished jobs on the study. Starts no processes.

Start reading in `coordinator.py`. `trials.py` creates the jobs of trials and enters their results
into the study, and `history.py` presents the trials to the strategy. `resolved.py` derives the
graph, the absolute budgets and the ends of the cost axis from a configuration, before any
training. Imports `jobs`, `strategies`, `config` and `study`.
"""
