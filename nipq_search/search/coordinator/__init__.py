"""The order of jobs, and the effect of finished jobs on the study. Starts no processes.

Start reading in `coordinator.py`. `trials.py` starts and ends trials, and `history.py` presents
them to the strategy. `resolved.py` derives the graph, the absolute budgets and the bounds of the
front's axis from a configuration, before any training. Imports `jobs`, `strategies`, `config` and
`study`.
"""
