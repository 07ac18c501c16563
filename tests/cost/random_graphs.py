"""Hypothesis strategies for small graphs of layers and tensors, bit-widths and budgets."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from nipq_search.cost import COSTS, Budget, exact_cost
from nipq_search.cost.projection import usage
from nipq_search.quant.graph import Graph, LayerInfo, TensorInfo

allowed_sets = st.sets(st.integers(2, 8), min_size=1, max_size=5).map(
    lambda widths: tuple(sorted(widths))
)


@st.composite
def graphs(draw):
    """Draw up to five layers with shared inputs, raw and float tensors, and gaps in the widths."""
    tensors, layers, inputs = {}, [], []

    def add(name, role, numel, **rest):
        tensors[name] = TensorInfo(name=name, role=role, numel=numel, **rest)
        return name

    for index in range(draw(st.integers(1, 5))):
        name = f"layer{index}"
        weight = add(
            f"{name}.weight",
            "weight",
            draw(st.integers(1, 500)),
            scales=draw(st.integers(1, 8)),
            allowed=draw(allowed_sets),
        )
        if inputs and draw(st.booleans()):
            source = draw(st.sampled_from(inputs))
        else:
            kind = draw(st.sampled_from(["searched", "searched", "raw", "float"]))
            rest = {
                "searched": {"allowed": draw(allowed_sets), "scales": 1},
                "raw": {"fixed_bits": 8},
                "float": {"fixed_bits": 32},
            }[kind]
            source = add(f"{name}.input", "activation", draw(st.integers(1, 500)), **rest)
            inputs.append(source)
        macs = draw(st.integers(1, 10_000))
        layers.append(LayerInfo(name=name, kind="linear", macs=macs, weight=weight, input=source))
    if draw(st.booleans()):
        add("(addition 0)", "addition", draw(st.integers(1, 50)), fixed_bits=32)
        layers.append(
            LayerInfo(name="(unconverted)", kind="functional", macs=7, weight=None, input=None)
        )
    return Graph(layers=tuple(layers), tensors=tensors, float_parameters=draw(st.integers(0, 9)))


def ends(graph):
    """Return the smallest and the largest width of every searched tensor."""
    searched = {name: t.allowed for name, t in graph.tensors.items() if t.allowed}
    return {n: a[0] for n, a in searched.items()}, {n: a[-1] for n, a in searched.items()}


@st.composite
def problems(draw):
    """Draw a graph, a reachable budget of one to three costs, soft bits and marginal losses."""
    graph = draw(graphs())
    least, most = ends(graph)
    targets = {}
    for name in draw(
        st.lists(st.sampled_from(sorted(COSTS)), min_size=1, max_size=3, unique=True)
    ):
        low, high = exact_cost(name, graph, least), exact_cost(name, graph, most)
        target = low + (high - low) * draw(st.floats(0.0, 1.2))
        targets[name] = max(target, 1e-6)
    soft = {n: least[n] + (most[n] - least[n]) * draw(st.floats(0, 1)) for n in least}
    marginal = {n: draw(st.floats(-1, 0.1)) for n in least}
    return graph, Budget(**targets), soft, marginal


def combinations(graph, units, budget):
    """Yield all choices of widths by unit that meet the budget."""
    alone = list(dict.fromkeys(units.values()))
    for widths in itertools.product(*(graph.tensors[unit].allowed for unit in alone)):
        chosen = dict(zip(alone, widths, strict=True))
        bits = {name: chosen[unit] for name, unit in units.items()}
        if usage(graph, bits, budget) <= 1:
            yield chosen
