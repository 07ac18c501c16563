"""Helpers that several tasks share: argument checks, splits, files of installed packages.

Imports nothing else of the tasks.
"""
