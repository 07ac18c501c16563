"""What must be in order before a sweep starts, and `nipq-search doctor`.

Start reading in `preflight.py`. Imports `backend` and what is below it.
"""
