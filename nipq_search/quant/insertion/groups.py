"""Groups of tensors that have one bit-width: residual sums, fused projections, the user's own."""

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
"""Groups that are found in the model; every other entry of `quant.groups` is a pattern."""


def tensor_groups(
    wanted: Sequence[str | Sequence[str]],
    layers: Sequence[Layer],
    infos: Sequence[LayerInfo],
    sums: Mapping[str, Sequence[Call]],
    tensors: Mapping[str, TensorInfo],
) -> list[list[str]]:
    """Names of the tensors of each group, groups that overlap joined.

    Args:
        wanted: `quant.groups`: `qkv`, `residual`, patterns of layers, or lists of patterns.
        layers: the traced layers.
        infos: the same layers in the graph.
        sums: calls of each quantized sum, by the name of its tensor.
        tensors: every tensor.

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
    """Weights of layers that consume one tensor and whose outputs attention multiplies."""
    by_label = {layer.call.origin: info for layer, info in zip(layers, infos, strict=False)}
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if len(layer.slots) < 2:
            continue
        for index in (0, 1):
            for operand in layer.operands(index):
                for origin in sorted(operand.origins):
                    info = by_label.get(origin)
                    if info is not None and info.weight is not None and info.input is not None:
                        group = groups.setdefault((layer.call.owner, info.input), [])
                        if info.weight not in group:
                            group.append(info.weight)
    return list(groups.values())


def _residual(sums: Mapping[str, Sequence[Call]]) -> list[list[str]]:
    """Sums of which one adds to the other's result."""
    by_label = {call.origin: name for name, calls in sums.items() for call in calls}
    groups = []
    for name, calls in sums.items():
        for call in calls:
            for operand in (o for pair in call.operands for o in pair if o is not None):
                found = {
                    by_label[o] for o in operand.origins if o.startswith(SUM) and o in by_label
                }
                groups += [[name, other] for other in sorted(found)]
    return groups


def _by_pattern(
    patterns: Sequence[str], layers: Sequence[Layer], infos: Sequence[LayerInfo]
) -> list[list[str]]:
    """Weights of the layers that match, and what those layers consume."""
    names = [LayerName(x.name, x.kind, x.weight is not None) for x in layers]
    check_patterns(patterns, names, "quant.groups")
    indices = sorted(set[int]().union(*(matching(pattern, names) for pattern in patterns)))
    chosen = [infos[index] for index in indices]
    weights = [info.weight for info in chosen if info.weight is not None]
    inputs = [t for info in chosen for t in (info.input, info.second) if t is not None]
    return [weights, inputs]


def _joined(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups that overlap as one, each without repeats; single tensors are no group."""
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
    """Give the quantizers of each group one bit-width, in place.

    Raises:
        UserError: the tensors of a group have no allowed width in common.
    """
    for group in groups:
        common = set(tensors[group[0]].allowed).intersection(*(tensors[n].allowed for n in group))
        if not common:
            raise UserError(
                f"quant.groups: {', '.join(group)} have no allowed bit-width in common; "
                "pin them alike"
            )
        allowed = tuple(sorted(common))
        first = quantizers[group[0]].bits
        for name in group:
            # Each keeps a bit-width of its own, for its own marginal loss; theta becomes one.
            bits = BitWidth(allowed, first.start, learned=first.wanted, key=first.key)
            quantizers[name].use(bits)
            tensors[name] = dataclasses.replace(tensors[name], allowed=allowed, group=group[0])
    tie(groups, quantizers)


def tie(groups: Iterable[Sequence[str]], quantizers: Mapping[str, FakeQuantizer]) -> None:
    """Let the members of each group learn one theta; also after a load that made new ones."""
    for group in groups:
        for name in group:
            quantizers[name].bits.tie(quantizers[group[0]].bits)


def groups_of(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """The groups of a graph, each with its first member in front."""
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.group is not None:
            found.setdefault(tensor.group, [tensor.group])
            if name != tensor.group:
                found[tensor.group].append(name)
    return list(found.values())
