"""Which job runs next, and what a finished one means. No clock, no processes, no Ray.

Start reading in `coordinator.py`; `trials.py` does the trials, `resolved.py` holds what follows
from a configuration before training: graph, absolute budgets, axes. Imports `jobs`, `strategies`,
`config` and `study`.
"""
