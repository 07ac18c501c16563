"""Hypothesis strategies for small graphs of layers and tensors."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from nipq_search.quant.graph import Graph, LayerInfo, TensorInfo
from nipq_search.quant.quantizers.base import TensorRole

allowed_sets = st.sets(st.integers(2, 8), min_size=1, max_size=5).map(
    lambda widths: tuple(sorted(widths))
)
"""Sets of allowed bit-widths, which may have gaps."""


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Draw a graph of one to five linear layers, whose inputs may be shared, raw or float.

    The graph may also contain an addition and an operation that is not converted.
    """
    tensors: dict[str, TensorInfo] = {}
    layers: list[LayerInfo] = []
    inputs: list[str] = []

    def add(name: str, role: TensorRole, numel: int, **rest: Any) -> str:
        tensors[name] = TensorInfo(name=name, role=role, numel=numel, **rest)
        return name

    for index in range(draw(st.integers(1, 5))):
        name = f"layer{index}"
        weight = add(
            f"{name}.weight",
            TensorRole.WEIGHT,
            draw(st.integers(1, 500)),
            scales=draw(st.integers(1, 8)),
            allowed=draw(allowed_sets),
        )
        if len(inputs) > 0 and draw(st.booleans()):
            source: str = draw(st.sampled_from(inputs))
        else:
            kind = draw(st.sampled_from(["searched", "searched", "raw", "float"]))
            kinds: dict[str, dict[str, Any]] = {
                "searched": {"allowed": draw(allowed_sets), "scales": 1},
                "raw": {"fixed_bits": 8},
                "float": {"fixed_bits": 32},
            }
            rest = kinds[kind]
            source = add(f"{name}.input", TensorRole.ACTIVATION, draw(st.integers(1, 500)), **rest)
            inputs.append(source)
        macs = draw(st.integers(1, 10_000))
        layers.append(LayerInfo(name=name, kind="linear", macs=macs, weight=weight, input=source))
    if draw(st.booleans()):
        add("(addition 0)", TensorRole.ADDITION, draw(st.integers(1, 50)), fixed_bits=32)
        layers.append(
            LayerInfo(name="(unconverted)", kind="functional", macs=7, weight=None, input=None)
        )
    return Graph(layers=tuple(layers), tensors=tensors, float_parameters=draw(st.integers(0, 9)))


def ends(graph: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """Return the smallest and the largest allowed bit-widths, each by name of searched tensor."""
    searched = {name: t.allowed for name, t in graph.tensors.items() if t.allowed}
    return {n: a[0] for n, a in searched.items()}, {n: a[-1] for n, a in searched.items()}
