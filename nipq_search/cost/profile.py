"""Costs by layer, for a prepared model or for a graph with given bit-widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from nipq_search.cost.base import Bits, complete_bits, hard_bits
from nipq_search.cost.bops import bops_terms
from nipq_search.errors import UserError
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import quant_state

if TYPE_CHECKING:
    import pandas


def layer_rows(graph: Graph, bits: Bits) -> list[dict[str, Any]]:
    """Return a row per layer: name, kind, macs, weight_bits, activation_bits, bops, weight_bytes.

    MACs and BOPs are per sample. Each row also contains `second_activation_bits`, the bit-width of
    the second operand of a product of two activations, and `why`, the reason why a layer stays in
    floating point; empty if it is quantized. Bit-widths are None for missing and floating-point
    operands; raw input has the width at which it is counted, such as 8 for uint8. The bytes of
    a weight that several layers share are listed only in the row of the first of them.
    """
    complete: Mapping[str, Any] = complete_bits(graph, bits)
    bops = bops_terms(graph, complete)

    def shown(tensor: str | None) -> int | None:
        if tensor is None or complete[tensor] == 32:
            return None
        return int(complete[tensor])

    first_use = {layer.weight: layer.name for layer in reversed(graph.layers)}
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "macs": layer.macs,
            "weight_bits": shown(layer.weight),
            "activation_bits": shown(layer.input),
            "bops": bops[layer.name],
            "weight_bytes": 0
            if layer.weight is None or first_use[layer.weight] != layer.name
            else graph.tensors[layer.weight].numel * complete[layer.weight] / 8,
            "second_activation_bits": shown(layer.second),
            "why": layer.float_reason,
        }
        for layer in graph.layers
    ]


def profile(model: nn.Module) -> pandas.DataFrame:
    """Return a table of a prepared model's layers at their hard bit-widths; see `layer_rows`.

    BOPs are counted according to convention 1; bytes cover only the packed weight. A row with text
    in `why` is a layer that stays in floating point; the row `(unconverted)` covers all
    multiplications that tracing could not attribute to a Python function.

    Raises:
        UserError: pandas is not installed, or the model is not prepared.

    Example:
        >>> import nipq_search as ns
        >>> import torch
        >>> model = ns.prepare(torch.nn.Linear(4, 2), torch.randn(1, 4))
        >>> ns.profile(model)[["kind", "macs", "weight_bits", "activation_bits", "bops"]]
             kind  macs  weight_bits  activation_bits  bops
        0  linear     8            8                8   512
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("profile needs pandas: python -m pip install pandas") from error

    return pandas.DataFrame(layer_rows(quant_state(model).graph, hard_bits(model)))
