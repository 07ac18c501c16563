"""The sweep file: sections, checks and value types.

Start reading in `sweep_config.py`; `resume.py` decides which settings may change on a resume.
Imports `strategies` to validate sampler and strategy names.
"""
