"""Makes `quant_models` importable from the test folders below."""
