"""Size of the stored model, in bytes."""

from __future__ import annotations

from typing import Any

from nipq_search.cost.base import Bits, Cost, sum_terms
from nipq_search.quant.graph import Graph


def weight_bytes_terms(graph: Graph, bits: Bits) -> dict[str, Any]:
    """Return the bytes of each densely packed weight, all scales, and all float parameters.

    Scales (of weights and activations) and float parameters count as 32 bits each. Zero-points
    and running statistics are not counted, since they can be folded into biases.
    """
    terms: dict[str, Any] = {
        name: tensor.numel * bits[name] / 8
        for name, tensor in graph.tensors.items()
        if tensor.role == "weight"
    }
    terms["(scales)"] = 4 * sum(tensor.scales for tensor in graph.tensors.values())
    terms["(float parameters)"] = 4 * graph.float_parameters
    return terms


WEIGHT_BYTES = Cost(name="weight_bytes", terms=weight_bytes_terms, combine=sum_terms)
