"""Mathematics of the quantizers as pure functions of tensors.

Start reading in `functional.py` (ranges, quantization, gradients); `widths.py` draws bit-widths
and `noise.py` draws pseudo-quantization noise. Imports no other package of the project.
"""
