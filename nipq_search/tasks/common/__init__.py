"""Helpers that several tasks share: checks and sections of arguments, splits, packaged files.

Start reading in `sections.py`. Imports no other package of the tasks.
"""
