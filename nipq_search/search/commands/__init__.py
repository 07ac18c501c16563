"""The commands `plan`, `replay` and `submit`, which do more than read a sweep's folder.

There is one file per command, which defines a function named after the command. This package may
import everything in `search` except `run` and `monitor`.
"""
