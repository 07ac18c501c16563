"""The task `image_folder`: timm models on images in class folders, Parquet or IDX files.

Start with `task.py`. `data.py`, `preprocessing.py` and `models.py` define the sections of its
arguments; `search.py` finds the images, `splits.py` divides them, and `batches.py` loads them.
"""
