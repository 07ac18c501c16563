"""Make the helper modules of this folder importable from its subfolders."""
