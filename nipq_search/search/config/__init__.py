"""The sweep file: sections, checks and value types.

Start reading in `sweep_config.py`. Imports `strategies` to validate sampler and strategy names.
"""
