"""Against oscillation: weight averaging, freezing, and its measure.

Each file is one method. Imports nothing else of the training.
"""
