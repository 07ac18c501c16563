"""Operations on a prepared model: bit-width transfer, range fitting, normalization statistics.

Each file contains one tool. Imports `insertion` and the packages below it.
"""
