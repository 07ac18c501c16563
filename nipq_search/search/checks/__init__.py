"""Checks before a sweep starts, and the checks of `nipq-search doctor`.

Start reading in `preflight.py`. Imports `backend` and the packages below it.
"""
