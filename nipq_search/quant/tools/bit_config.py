"""Bit-widths as a JSON-able dict that can be carried from one model or run to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nipq_search.errors import UserError, nearest
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import M, quant_state, quantizers
from nipq_search.quant.quantizers.bit_width import BitWidth

PARTS = ("weights", "activations")


def bit_config(model: nn.Module) -> dict[str, dict[str, int]]:
    """The hard bit-widths of a prepared model.

    Returns:
        `{"weights": {layer: bits}, "activations": {layer: bits}}`; an activation that several
        layers consume stands under each of them. The second operand of a product of two
        activations is `<layer>.second`, a residual sum stands under its own name. Layers in float
        are left out.
    """
    hard = {name: quantizer.bits.hard() for name, quantizer in quantizers(model).items()}
    graph = quant_state(model).graph
    return {
        part: {
            key: hard[tensor] for key, tensor in _entries(graph, part).items() if tensor in hard
        }
        for part in PARTS
    }


def _entries(graph: Graph, part: str) -> dict[str, str | None]:
    """Tensors by the names that a bit configuration gives them."""
    if part == "weights":
        return {layer.name: layer.weight for layer in graph.layers}
    entries = {layer.name: layer.input for layer in graph.layers}
    entries |= {f"{layer.name}.second": layer.second for layer in graph.layers}
    return entries | {n: n for n, tensor in graph.tensors.items() if tensor.role == "addition"}


def apply_bit_config(model: M, bits: Mapping[str, Any], *, freeze: bool = True) -> M:
    """Give a prepared model the bit-widths of `bit_config`, in place.

    Args:
        model: a prepared model with the same layers.
        bits: what `bit_config` returned.
        freeze: freeze them, which is final; otherwise learning starts from them.

    Raises:
        UserError: a layer is unknown or missing, a width is not allowed there or the layer is
            frozen at another, or layers that share a tensor disagree about it. Nothing is changed
            then.
    """
    found = quantizers(model)
    wanted: dict[str, int] = {}
    groups = {name: tensor.group for name, tensor in quant_state(model).graph.tensors.items()}
    for part in PARTS:
        if not isinstance(bits.get(part), Mapping):
            raise UserError(f"bit config: '{part}' is missing; expected weights and activations")
        known = {
            key: tensor
            for key, tensor in _entries(quant_state(model).graph, part).items()
            if tensor in found
        }
        for layer, width in bits[part].items():
            if layer not in known:
                hint = nearest(layer, known)
                raise UserError(f"bit config: {part}.{layer}: no such layer{hint}")
            tensor = known[layer]
            assert tensor is not None
            if wanted.setdefault(tensor, width) != width:
                raise UserError(
                    f"bit config: {part}.{layer}: {width} bits, but another layer that consumes "
                    f"the same tensor has {wanted[tensor]}"
                )
            group = groups.get(tensor) or tensor
            if wanted.setdefault(group, width) != width:
                raise UserError(
                    f"bit config: {part}.{layer}: {width} bits, but its group has {wanted[group]}"
                )
            _check(found[tensor].bits, width, freeze, f"bit config: {part}.{layer}")
        missing = known.keys() - bits[part].keys()
        if missing:
            raise UserError(f"bit config: {part}.{min(missing)} is missing")
    for tensor, width in wanted.items():
        if freeze:
            found[tensor].freeze(width)
        else:
            found[tensor].start_at(width)
    return model


def _check(bits: BitWidth, width: Any, freeze: bool, key: str) -> None:
    if isinstance(width, bool) or not isinstance(width, (int, float)):
        raise UserError(f"{key}: {width!r} is no bit-width")
    if bits.is_frozen and (width != bits.hard() or not freeze):
        raise UserError(f"{key}: frozen at {bits.hard()} bits already; prepare a new model")
    if freeze and width not in bits.allowed:
        raise UserError(f"{key}: {width} bits are not among {list(bits.allowed)}")
