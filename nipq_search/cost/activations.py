"""Activation memory per sample, in bytes."""

from __future__ import annotations

from typing import Any

from nipq_search.cost.base import Bits, Cost, largest_term, sum_terms
from nipq_search.quant.graph import Graph


def activation_terms(graph: Graph, bits: Bits) -> dict[str, Any]:
    """Return the bytes per sample of each activation that layers consume and each residual sum.

    Residual sums count as 32 bits per element unless they are quantized.
    """
    return {
        name: tensor.numel * bits[name] / 8
        for name, tensor in graph.tensors.items()
        if tensor.role in ("activation", "addition")
    }


SUM = Cost(name="activation_sum_bytes", terms=activation_terms, combine=sum_terms)
LARGEST = Cost(name="activation_largest_bytes", terms=activation_terms, combine=largest_term)
