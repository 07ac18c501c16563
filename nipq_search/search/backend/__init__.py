"""Executors, which run the coordinator's jobs, and everything that touches Ray.

Start reading in `base.py` (the protocol) and `tune.py` (Ray Tune). `virtual.py` runs jobs in this
process in virtual time, `ray_compat.py` holds every patch of Ray's internals. Imports
`coordinator`, `worker` and what is below them.
"""
