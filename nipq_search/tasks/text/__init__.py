"""Text classification and language modeling with transformers models.

Start with `classification.py` or `language_modeling.py`. Imports only `base` and `common`.
"""
