"""Cost by layer, of a prepared model or of a graph with given bit-widths."""

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
    """A row per layer: name, kind, macs, weight_bits, activation_bits, bops, weight_bytes, ...

    `second_activation_bits` is of the other operand in a product of two activations, and `why`
    says why the layer stays in floating point. Bits are null for an operand that does not exist or
    is in floating point; raw uint8 input shows its 8 bits. A weight that several layers use has
    its bytes at the first one.
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
    """Table of a prepared model's layers at their hard bit-widths; see `layer_rows`.

    MACs and BOPs are per sample (convention 1), bytes those of the packed weight alone. Rows with
    a text in `why` are multiplications that stay in floating point; `(unconverted)` is what no
    Python function showed.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("profile makes a pandas table: python -m pip install pandas") from error

    return pandas.DataFrame(layer_rows(quant_state(model).graph, hard_bits(model)))
