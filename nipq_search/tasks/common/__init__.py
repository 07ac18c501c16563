"""Helpers shared by several tasks: argument checks and sections, splits, and packaged files.

Start with `sections.py`. Imports no other package of the tasks.
"""
