"""The quantizers' forward and backward passes, as fast as the device allows.

Start reading in `dispatch.py`, which chooses a backend for a tensor: `cpu.py` (C), `cuda.py`
(Triton), or the torch operations of `numerics`. All of them compute the same. `compiled.py` wraps
them for `torch.compile`, `kept.py` decides what is stored for the backward. Imports `numerics`.
"""

from __future__ import annotations

from nipq_search.quant.kernels.dispatch import (
    backend_for,
    gradients,
    hard_quantize,
    pseudo_quantize,
)

__all__ = ["backend_for", "gradients", "hard_quantize", "pseudo_quantize"]
