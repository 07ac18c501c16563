"""Makes the tiny data of this folder importable from the folders below."""
