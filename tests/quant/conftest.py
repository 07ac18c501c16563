"""Make `quant_models` importable from the subfolders."""
