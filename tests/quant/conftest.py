"""Makes `quant_models` importable from the folders below."""
