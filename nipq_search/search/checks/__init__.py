"""Checks that run before a sweep starts, and those of `nipq-search doctor`.

Start reading in `preflight.py`. Imports `backend` and the packages below it.
"""
