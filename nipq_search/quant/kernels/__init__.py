"""Fast forward and backward passes of the quantizers.

Start reading in `dispatch.py`, which selects a backend for each tensor: `cpu.py` (C), `cuda.py`
(Triton), or the torch operations of `numerics`, all with the same results up to rounding.
`compiled.py` wraps them for `torch.compile`; `kept.py` defines which tensors are saved for the
backward pass; `relu.py` is a ReLU that saves less memory. Imports `numerics`.
"""

from __future__ import annotations

from nipq_search.quant.kernels.dispatch import (
    backend_for,
    gradients,
    hard_quantize,
    pseudo_quantize,
)

__all__ = ["backend_for", "gradients", "hard_quantize", "pseudo_quantize"]
