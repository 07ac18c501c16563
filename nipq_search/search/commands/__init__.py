"""The commands `plan`, `replay` and `submit`, which do more than read a sweep's folder.

One file per command; each contains a function with the name of the command. May import everything
in `search` except `run` and `monitor`.
"""
