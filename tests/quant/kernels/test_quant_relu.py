"""ReLU layers of prepared models."""

from __future__ import annotations

import pytest
import torch
from quant_models import normal
from torch import nn

from nipq_search.quant.kernels.relu import make_lean


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 7, 6, 11), (9, 4001)])
def test_lean_relu_is_relu(kind, inplace, shape):
    plain, lean = kind(inplace), kind(inplace)
    make_lean(lean)
    assert isinstance(lean, kind) and type(lean) is not kind
    leaf = (normal(*shape) * 4).requires_grad_()
    with torch.no_grad():
        leaf[0] = 0.0
    outs = []
    for layer in (plain, lean):
        x = leaf * 1.0
        y = layer(x)
        assert (y is x) == inplace or torch.equal(y, x) == inplace
        outs.append([y, *torch.autograd.grad(y.square().sum() + y.sum(), leaf)])
    assert type(outs[1][0].grad_fn).__name__ == "_ReLUBackward"
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
    # For a view, a leaf and a transposed tensor, the results are those of torch's ReLU.
    x = leaf * 1.0
    view = x.view(-1)
    assert torch.equal(lean(view), plain((leaf * 1.0).view(-1)))
    assert bool((x >= 0).all()) == inplace
    every_second = (leaf * 1.0)[..., ::2]
    assert torch.equal(lean(every_second), plain((leaf * 1.0)[..., ::2]))
    with torch.no_grad():
        assert torch.equal(lean(leaf * 1.0), plain(leaf * 1.0))
    assert lean(torch.tensor([float("nan")], requires_grad=True) * 1.0).isnan().all()
