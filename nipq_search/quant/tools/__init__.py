"""Operations on a prepared model: bit-width transfer, range fitting, optimizer groups and so on.

Each file contains one tool. Imports `insertion` and the packages below it.
"""
