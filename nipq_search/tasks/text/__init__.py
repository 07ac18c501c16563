"""Text classification and language modeling with models of transformers.

Start reading in `classification.py` or `language_modeling.py`. Imports only `base` and `common`.
"""
