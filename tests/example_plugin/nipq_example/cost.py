"""A cost: the number of bytes that one sample moves between the memory and the processor."""

from __future__ import annotations

from nipq_search.cost import Cost
from nipq_search.cost.base import sum_terms


def traffic_terms(graph, bits):
    """Return the bytes of every weight and every activation, each moved once."""
    return {name: tensor.numel * bits[name] / 8 for name, tensor in graph.tensors.items()}


TRAFFIC_BYTES = Cost(name="traffic_bytes", terms=traffic_terms, combine=sum_terms)
