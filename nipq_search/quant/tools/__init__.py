"""What is done to a prepared model: bits in and out, range fitting, normalization statistics.

Each file is one tool. Imports `insertion` and what is below it.
"""
