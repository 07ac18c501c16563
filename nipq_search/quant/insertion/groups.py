"""Groups of tensors that share a bit-width: residual sums, attention projections, user groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nipq_search.errors import UserError
from nipq_search.quant.graph import LayerInfo, TensorInfo
from nipq_search.quant.insertion.pins import LayerName, check_patterns, matching
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.tracing.flow import SUM

if TYPE_CHECKING:
    from nipq_search.quant.tracing.roles import Layer
    from nipq_search.quant.tracing.trace import Call

QKV, RESIDUAL = "qkv", "residual"
"""Groups detected in the model; every other entry of `quant.groups` is a layer pattern."""


def tensor_groups(
    wanted: Sequence[str | Sequence[str]],
    layers: Sequence[Layer],
    infos: Sequence[LayerInfo],
    sums: Mapping[str, Sequence[Call]],
    tensors: Mapping[str, TensorInfo],
) -> list[list[str]]:
    """Return the tensor names of each group; overlapping groups are merged.

    Args:
        wanted: entries of `quant.groups`: `qkv`, `residual`, layer patterns, or lists of patterns.
        layers: the traced layers.
        infos: graph entries of the same layers, in the same order; further ones are ignored.
        sums: calls of each quantized sum, by tensor name.
        tensors: all tensors by name.

    Returns:
        Groups of at least two quantized tensors.

    Raises:
        UserError: a pattern matches no layer.
    """
    found: list[list[str]] = []
    for entry in wanted:
        if entry == QKV:
            found += _projections(layers, infos)
        elif entry == RESIDUAL:
            found += _residual(sums)
        else:
            found += _by_pattern([entry] if isinstance(entry, str) else entry, layers, infos)
    quantized = {name for name, tensor in tensors.items() if tensor.allowed}
    return _joined([[name for name in group if name in quantized] for group in found])


def _projections(layers: Sequence[Layer], infos: Sequence[LayerInfo]) -> list[list[str]]:
    """Return groups of weights whose layers map one tensor to operands of one attention module."""
    by_origin = {layer.call.origin: info for layer, info in zip(layers, infos, strict=False)}
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if len(layer.slots) < 2:
            continue
        for index in (0, 1):
            for operand in layer.operands(index):
                for origin in sorted(operand.origins):
                    info = by_origin.get(origin)
                    if info is not None and info.weight is not None and info.input is not None:
                        group = groups.setdefault((layer.call.owner, info.input), [])
                        if info.weight not in group:
                            group.append(info.weight)
    return list(groups.values())


def _residual(sums: Mapping[str, Sequence[Call]]) -> list[list[str]]:
    """Return pairs of sums in which the result of one sum is a term of the other."""
    by_origin = {call.origin: name for name, calls in sums.items() for call in calls}
    groups = []
    for name, calls in sums.items():
        for call in calls:
            for operand in (o for pair in call.operands for o in pair if o is not None):
                found = {
                    by_origin[o] for o in operand.origins if o.startswith(SUM) and o in by_origin
                }
                groups += [[name, other] for other in sorted(found)]
    return groups


def _by_pattern(
    patterns: Sequence[str], layers: Sequence[Layer], infos: Sequence[LayerInfo]
) -> list[list[str]]:
    """Return two groups: the weights of all matching layers, and their inputs."""
    names = [LayerName(x.name, x.kind, x.weight is not None) for x in layers]
    check_patterns(patterns, names, "quant.groups")
    indices = sorted(set[int]().union(*(matching(pattern, names) for pattern in patterns)))
    chosen = [infos[index] for index in indices]
    weights = [info.weight for info in chosen if info.weight is not None]
    inputs = [t for info in chosen for t in (info.input, info.second) if t is not None]
    return [weights, inputs]


def _joined(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Merge overlapping groups, remove repetitions, and drop groups of a single tensor."""
    joined: list[list[str]] = []
    for group in groups:
        merged = list(dict.fromkeys(group))
        rest = []
        for other in joined:
            if set(other) & set(merged):
                merged = list(dict.fromkeys([*other, *merged]))
            else:
                rest.append(other)
        joined = [*rest, merged]
    return [group for group in joined if len(group) > 1]


def share_bits(
    groups: Iterable[Sequence[str]],
    tensors: dict[str, TensorInfo],
    quantizers: Mapping[str, FakeQuantizer],
) -> None:
    """Share one bit-width among the quantizers of each group, in place, before training.

    Args:
        groups: tensor names of each group.
        tensors: all tensors by name; updated with the common allowed set and the group name.
        quantizers: all quantizers by tensor name.

    Raises:
        UserError: the tensors of a group have no allowed bit-width in common.
    """
    for group in groups:
        common = set(tensors[group[0]].allowed).intersection(*(tensors[n].allowed for n in group))
        if not common:
            raise UserError(
                f"quant.groups: {', '.join(group)} have no allowed bit-width in common; "
                "use the same pin for all of them"
            )
        allowed = tuple(sorted(common))
        first = quantizers[group[0]].bits
        for name in group:
            # Each tensor keeps a separate `BitWidth` for its `marginal`; `tie` shares theta.
            bits = BitWidth(allowed, first.start, learned=first.learnable, key=first.key)
            quantizers[name].replace_bits(bits)
            tensors[name] = dataclasses.replace(tensors[name], allowed=allowed, group=group[0])
    tie(groups, quantizers)


def tie(groups: Iterable[Sequence[str]], quantizers: Mapping[str, FakeQuantizer]) -> None:
    """Make the quantizers in each group share one theta.

    Call this function again after loading a state dict, which may create new parameters.
    """
    for group in groups:
        for name in group:
            quantizers[name].bits.tie(quantizers[group[0]].bits)


def groups_of(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Return the groups of a graph, each starting with the tensor that names it."""
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.group is not None:
            found.setdefault(tensor.group, [tensor.group])
            if name != tensor.group:
                found[tensor.group].append(name)
    return list(found.values())
