"""Mean bit-widths of quantized weights and of quantized activations, weighted by element count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nipq_search.cost.base import Bits, Cost, sum_terms
from nipq_search.quant.graph import Graph


def _mean_terms(role: str) -> Callable[[Graph, Bits], dict[str, Any]]:
    """Return a function that computes what each quantized tensor with `role` adds to the mean."""

    def terms(graph: Graph, bits: Bits) -> dict[str, Any]:
        chosen = {n: t for n, t in graph.tensors.items() if t.role == role and t.allowed}
        total = sum(tensor.numel for tensor in chosen.values())
        return {name: bits[name] * (tensor.numel / total) for name, tensor in chosen.items()}

    return terms


MEAN_WEIGHT_BITS = Cost(
    name="mean_weight_bits", terms=_mean_terms("weight"), combine=sum_terms, whole=False
)
MEAN_ACTIVATION_BITS = Cost(
    name="mean_activation_bits", terms=_mean_terms("activation"), combine=sum_terms, whole=False
)
