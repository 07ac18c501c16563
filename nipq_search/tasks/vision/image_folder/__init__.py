"""The task `image_folder`: timm models on images in class folders, Parquet or IDX files.

Start reading in `task.py`. `search.py` finds the images, `splits.py` divides them, `batches.py`
loads them, `models.py` builds the model and its teacher.
"""
