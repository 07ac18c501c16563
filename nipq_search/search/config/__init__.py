"""The sweep file: its sections, checks and value types.

Start reading in `sweep_config.py`. Imports `strategies`, for the names that a sweep file may use.
"""
