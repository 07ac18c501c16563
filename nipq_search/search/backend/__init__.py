"""Executors that run the coordinator's jobs, and the Ray clusters they use.

Start reading in `base.py` (the protocol) and `tune.py` (Ray Tune). `virtual.py` runs jobs in
virtual time in the current process; `ray_compat.py` contains the patches of Ray internals. Imports
`coordinator`, `worker` and the packages below them.
"""
