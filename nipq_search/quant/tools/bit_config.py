"""Bit-widths as a JSON-serializable dict, for transfer between models and runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nipq_search.errors import UserError, nearest
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import M, quant_state, quantizers
from nipq_search.quant.quantizers.base import TensorRole
from nipq_search.quant.quantizers.bit_width import BitWidth

SECTIONS = ("weights", "activations")
"""Top-level keys of a bit configuration."""


def bit_config(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the hard bit-widths of a prepared model.

    Returns:
        `{"weights": {layer: bits}, "activations": {layer: bits}}`. An activation that several
        layers consume is listed under each of them, the second operand of a product of two
        activations as `<layer>.second`, and a residual sum under its own name. Layers in float
        are omitted.

    Example:
        >>> import torch
        >>> from nipq_search import bit_config, prepare
        >>> model = prepare(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(16, 8))
        >>> bit_config(model)
        {'weights': {'0': 8}, 'activations': {'0': 8}}
    """
    hard = {name: quantizer.bits.hard() for name, quantizer in quantizers(model).items()}
    graph = quant_state(model).graph
    return {
        section: {
            key: hard[tensor] for key, tensor in _entries(graph, section).items() if tensor in hard
        }
        for section in SECTIONS
    }


def _entries(graph: Graph, section: str) -> dict[str, str | None]:
    """Map the keys of one section of a bit configuration to tensor names."""
    if section == "weights":
        return {layer.name: layer.weight for layer in graph.layers}
    entries = {layer.name: layer.input for layer in graph.layers}
    entries |= {f"{layer.name}.second": layer.second for layer in graph.layers}
    return entries | {
        n: n for n, tensor in graph.tensors.items() if tensor.role is TensorRole.ADDITION
    }


def apply_bit_config(model: M, bits: Mapping[str, Any], *, freeze: bool = True) -> M:
    """Apply the result of `bit_config` to a prepared model, in place.

    Args:
        model: a prepared model with the same layers.
        bits: bit-widths in the format of `bit_config`; fractional ones are permitted if `freeze`
            is false.
        freeze: whether to freeze the bit-widths, which is irreversible; otherwise learning
            starts from them.

    Returns:
        The same model.

    Raises:
        UserError: a section or layer is missing; a layer is unknown; a value is not a number or,
            with `freeze`, not an allowed bit-width; a bit-width is already frozen at another value
            or, without `freeze`, at any; or layers that share a tensor or a group are assigned
            different bit-widths. The model is unchanged in that case.

    Example:
        >>> import torch
        >>> from nipq_search import apply_bit_config, bit_config, prepare
        >>> model = prepare(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(16, 8))
        >>> model = apply_bit_config(model, {"weights": {"0": 4}, "activations": {"0": 6}})
        >>> bit_config(model)
        {'weights': {'0': 4}, 'activations': {'0': 6}}
    """
    found = quantizers(model)
    wanted: dict[str, int] = {}
    groups = {name: tensor.group for name, tensor in quant_state(model).graph.tensors.items()}
    for section in SECTIONS:
        if not isinstance(bits.get(section), Mapping):
            raise UserError(
                f"bit config: '{section}' must map layer names to bit-widths; expected the "
                "sections weights and activations"
            )
        known = {
            key: tensor
            for key, tensor in _entries(quant_state(model).graph, section).items()
            if tensor in found
        }
        for layer, width in bits[section].items():
            if layer not in known:
                hint = nearest(layer, known)
                raise UserError(f"bit config: {section}.{layer}: no such layer{hint}")
            tensor = known[layer]
            assert tensor is not None
            if wanted.setdefault(tensor, width) != width:
                raise UserError(
                    f"bit config: {section}.{layer}: {width} bits, but another layer that "
                    f"consumes the same tensor has {wanted[tensor]}"
                )
            group = groups.get(tensor) or tensor
            if wanted.setdefault(group, width) != width:
                raise UserError(
                    f"bit config: {section}.{layer}: {width} bits, but its group has "
                    f"{wanted[group]}"
                )
            _check(found[tensor].bits, width, freeze, f"bit config: {section}.{layer}")
        missing = known.keys() - bits[section].keys()
        if missing:
            raise UserError(f"bit config: {section}.{min(missing)} is missing")
    for tensor, width in wanted.items():
        if freeze:
            found[tensor].freeze(width)
        else:
            found[tensor].start_at(width)
    return model


def _check(bits: BitWidth, width: Any, freeze: bool, key: str) -> None:
    if isinstance(width, bool) or not isinstance(width, (int, float)):
        raise UserError(f"{key}: {width!r} is not a bit-width")
    if bits.is_frozen and (width != bits.hard() or not freeze):
        raise UserError(f"{key}: already frozen at {bits.hard()} bits; prepare a new model")
    if freeze and width not in bits.allowed:
        raise UserError(f"{key}: {width} bits are not allowed; choose from {list(bits.allowed)}")
