"""Where bit-widths start: at a parent's, at one width, or at measured sensitivities.

Imports nothing else of the training.
"""
