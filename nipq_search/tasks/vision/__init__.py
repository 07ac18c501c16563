"""Image classification: Fashion-MNIST, digits, and timm models on folders of images.

Start with `digits.py`, the smallest task; `image_folder/` is the largest. Imports only
`base` and `common`.
"""
