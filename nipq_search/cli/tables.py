"""Tables and text lines for the documents that `--json` prints; most commands have one function.

Any value may be missing (None, or no key) and is displayed as `-`, because the commands also work
on sweeps that have just started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nipq_search.cli import numbers

Document = Mapping[str, Any]

_HEADINGS = {
    "weight_bytes": "weight",
    "activation_sum_bytes": "activations",
    "activation_largest_bytes": "largest act.",
}
"""Short column headings of costs; the cells contain the unit."""

_LEFT = {"budget", "state", "reason", "layer", "kind", "check", "result", "detail", "cost name"}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        left = column in _LEFT
        # On narrow terminals, truncate long budget labels instead of wrapping every row.
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "budget")
    for row in rows:
        # Use Text, because rich would parse a str such as the layer name `[bold]` as markup.
        table.add_row(*(Text(numbers.one_line(cell)) for cell in row))
    return table


def _line(text: str) -> Text:
    return Text(numbers.one_line(text))


def _word(value: object) -> str:
    """Convert a value to text; return `-` if it is missing."""
    return numbers.NOTHING if value is None or value == "" else str(value)


def front(document: Document) -> RenderableType:
    """Render the Pareto front, the float model, the uniform baselines and the hypervolumes."""
    front_cost = str(document.get("front_cost") or "bops")
    metric = _word((document.get("metric") or {}).get("name"))
    points = document.get("points") or []
    on_front = [point for point in points if point.get("on_front")]
    on_front.sort(key=lambda point: (point.get("cost") or {}).get(front_cost) or 0.0)
    names = list(dict.fromkeys([front_cost, "bops", "weight_bytes"]))
    rows = [_front_row(str(point["trial"]), _budget(point), names, point) for point in on_front]
    rows.append(_front_row(numbers.NOTHING, "float model", names, document.get("float") or {}))
    for model in document.get("baselines") or []:
        rows.append(
            _front_row(numbers.NOTHING, f"LSQ uniform {_word(model.get('bits'))}", names, model)
        )
    headings = [_HEADINGS.get(name, name) for name in names]
    columns = ["trial", "budget", *headings, "W bits", "A bits", "valid.", "test"]
    counts = f"{len(on_front)} of {len(points)} finished trials are on the front"
    return Group(
        _line(f"{_word(document.get('sweep'))}: {metric} against {front_cost}, {counts}"),
        _table(columns, rows),
        _line(f"hypervolume, validation: {numbers.metric(document.get('hypervolume'))}"),
        _line(f"hypervolume, test: {numbers.metric(document.get('test_hypervolume'))}"),
        _line(f"training samples: {numbers.count(document.get('total_samples'))}"),
        _line("W bits and A bits are the mean bit-widths of weights and activations"),
        _convention(document),
    )


def _convention(document: Document) -> Text:
    return _line(f"BOPs convention {_word(document.get('bops_convention'))}")


def _budget(point: Document) -> str:
    return _word(point.get("budget_label") or numbers.costs(point.get("budget")))


def _front_row(trial: str, label: str, names: Sequence[str], point: Document) -> list[str]:
    cost = point.get("cost") or {}
    return [
        trial,
        label,
        *(numbers.cost(name, cost.get(name)) for name in names),
        numbers.bits(cost.get("mean_weight_bits")),
        numbers.bits(cost.get("mean_activation_bits")),
        numbers.metric(point.get("validation")),
        numbers.metric(point.get("test")),
    ]


def best(document: Document) -> RenderableType:
    """Render the best point, or the nearest one and why no point satisfies the limits."""
    point = document.get("point") or document.get("nearest")
    model = f"model: {document['model']} in the sweep's folder" if document.get("model") else ""
    if point is None:
        return Group(*(_line(text) for text in document.get("blocks") or ["no trained point yet"]))
    limits = document.get("limits") or {}
    cost = point.get("cost") or {}
    title = "trial" if document.get("point") else "nearest: trial"
    rows = [
        [name, numbers.cost(name, value), numbers.cost(name, limits.get(name))]
        for name, value in cost.items()
    ]
    return Group(
        _line(
            f"{title} {_word(point.get('trial'))} ({_budget(point)}), "
            f"validation {numbers.metric(point.get('validation'))}, "
            f"test {numbers.metric(point.get('test'))}"
        ),
        _table(["cost name", "cost", "limit"], rows),
        *([_line(model)] if model else []),
        *(_line(text) for text in document.get("blocks") or []),
    )


def status(document: Document) -> RenderableType:
    """Render the driver, the stage, the number of trials in each state, and one row per trial."""
    states = document.get("states") or {}
    driver = document.get("driver")
    by = f"driver on {driver['host']}, pid {driver['pid']}" if driver else "no driver is running"
    if driver is None and states.get("RUNNING"):
        by += "; RUNNING trials were interrupted; `nipq-search run` resumes them"
    counts = ", ".join(f"{number} {state}" for state, number in states.items() if number)
    rows = [
        [
            str(trial["trial"]),
            _word(trial.get("state")),
            _budget(trial),
            numbers.count(trial.get("epoch")),
            numbers.duration(trial.get("seconds")),
            str(trial.get("reason") or ""),
        ]
        for trial in document.get("trials") or []
    ]
    return Group(
        _line(f"{_word(document.get('sweep'))}: {by}"),
        _line(f"{counts or '0'} of {_word(document.get('total'))} trials"),
        *([_line(f"stage: {document['stage']}")] if document.get("stage") else []),
        _table(["trial", "state", "budget", "epoch", "time", "reason"], rows),
        _line(f"training samples: {numbers.count(document.get('total_samples'))}"),
    )


def show(document: Document) -> RenderableType:
    """Render one trial: its budget, parameters and results, and its bit-widths by layer."""
    params = ", ".join(
        f"{name} {numbers.setting(value)}"
        for name, value in (document.get("params") or {}).items()
    )
    lines = [
        f"trial {_word(document.get('trial'))} {_word(document.get('state'))}, "
        f"budget {_budget(document)}",
        f"validation {numbers.metric(document.get('validation'))}, "
        f"test {numbers.metric(document.get('test'))}",
        f"cost: {_word(numbers.costs(document.get('cost')))}",
        f"parameters: {_word(params)}",
    ]
    if document.get("parent") is not None:
        lines.append(f"started from: trial {document['parent']}")
    if document.get("model"):
        lines.append(f"model: {document['model']} in the sweep's folder")
    if document.get("reason"):
        lines.append(f"reason: {document['reason']}")
    return Group(*map(_line, lines), layers(document.get("layers") or []))


def layers(rows: Sequence[Document]) -> RenderableType:
    """Render bit-widths and costs by layer; layers that are not quantized show `float`."""
    searched = any("searched" in row for row in rows)
    reasons = any(row.get("why") for row in rows)
    columns = ["layer", "kind", "MACs", "W bits", "A bits", "BOPs", "weight"]
    return _table(
        [*columns, *(["searched"] if searched else []), *(["why in float"] if reasons else [])],
        (
            [
                _word(row.get("name")),
                _word(row.get("kind")),
                numbers.count(row.get("macs")),
                _weight_width(row),
                _activation_width(row),
                numbers.bops(row.get("bops")),
                numbers.kilobytes(row.get("weight_bytes")),
                *(["yes" if row.get("searched") else "no"] if searched else []),
                *([_word(row.get("why"))] if reasons else []),
            ]
            for row in rows
        ),
    )


def _weight_width(row: Document) -> str:
    """Format the bit-width of the weight; `-` for a product of two activations."""
    if row.get("weight_bits") is None and row.get("second_activation_bits") is not None:
        return "-"
    return _width(row, "weight_bits")


def _activation_width(row: Document) -> str:
    """Format the bit-width of the input, or of both operands of a product of two activations.

    The result is `-` for an embedding, whose input is not quantized.
    """
    if row.get("kind") == "embedding":
        return "-"
    bits = _width(row, "activation_bits")
    second = row.get("second_activation_bits")
    return bits if second is None else f"{bits} x {numbers.bits(second)}"


def _width(row: Document, key: str) -> str:
    """Format a bit-width of a row; `float` if it is missing and not searched."""
    if row.get(key) is None and not row.get("searched"):
        return "float"
    return numbers.bits(row.get(key))


def plan(document: Document) -> RenderableType:
    """Render a plan: layers, reachable costs, budgets, training samples and disk space."""
    reachable = [
        [name, numbers.cost(name, ends.get("least")), numbers.cost(name, ends.get("greatest"))]
        for name, ends in (document.get("reachable") or {}).items()
    ]
    budgets = [
        [
            _word(budget.get("label")),
            _word(numbers.costs(budget.get("targets"))),
            _word(numbers.costs(budget.get("reachable"))),
            numbers.share(budget.get("reachable_share")),
        ]
        for budget in document.get("budgets") or []
    ]
    data = document.get("data") or {}
    sizes = [f"{numbers.count(n)} {split}" for split, n in (data.get("splits") or {}).items()]
    if data.get("classes") is not None:
        sizes.append(f"{numbers.count(data['classes'])} classes")
    return Group(
        *([_line(f"{_word(data.get('name'))}: {', '.join(sizes)}"), Text()] if sizes else []),
        layers(document.get("layers") or []),
        Text(),
        _table(["cost name", "least", "greatest"], reachable),
        Text(),
        _table(["budget", "target", "reachable", "share"], budgets),
        _line(
            f"{numbers.count(document.get('trials'))} trials, "
            f"up to {numbers.count(document.get('samples'))} training samples, "
            f"{numbers.megabytes(document.get('disk_bytes'))} on disk"
        ),
        *_noise(document),
        _convention(document),
    )


def _noise(document: Document) -> list[RenderableType]:
    """Return a line about the length of the noise phase, or no line if the length is unknown."""
    steps = document.get("noise_steps")
    if steps is None:
        return []
    if steps:
        return [_line(f"noise phase of at most {numbers.count(steps)} steps")]
    return [_line("no noise phase: bit-widths are projected, not learned")]


def doctor(checks: Sequence[Document]) -> RenderableType:
    """Render the result of every check, with the fix of each check that failed."""
    rows = []
    for check in checks:
        detail = str(check.get("detail") or "")
        if not check.get("ok") and check.get("fix"):
            detail = f"{detail}; {check['fix']}" if detail else str(check["fix"])
        rows.append([_word(check.get("check")), "ok" if check.get("ok") else "FAILED", detail])
    return _table(["check", "result", "detail"], rows)


def replay(document: Document) -> RenderableType:
    """Render whether a replay matches the recorded trial, and list any differences."""
    trial, sha = document["trial"], str(document["model_sha256"])[:12]
    if document["equal"]:
        agreement = "identical bit by bit" if document["exact"] else _within(document)
        return _line(f"trial {trial}: {agreement} (model {sha})")
    rows = [
        [entry["name"], _word(entry["recorded"]), _word(entry["replayed"])]
        for entry in document["differences"]
    ]
    return Group(
        _line(f"trial {trial}: the replay did not match the recorded trial"),
        _table(["name", "recorded", "replayed"], rows),
    )


def _within(document: Document) -> str:
    """Describe the tolerances within which a replay matches the recorded trial."""
    weights, metrics = document["tolerance"]["weights"], document["tolerance"]["metrics"]
    if not document["weights_compared"]:
        return f"metrics within {numbers.share(metrics)}; the recorded model was deleted"
    return f"weights within {numbers.share(weights)}, metrics within {numbers.share(metrics)}"


def gc(document: Document) -> RenderableType:
    """Render the paths that were or would be deleted, and the number of models that remain."""
    rows = [
        ["-" if e["trial"] is None else str(e["trial"]), e["path"], numbers.count(e["bytes"])]
        for e in document["freed"]
    ]
    word = "would be freed" if document["dry_run"] else "freed"
    text = f"{numbers.count(document['bytes'])} bytes {word}, {len(document['kept'])} models kept"
    return Group(*([_table(["trial", "path", "bytes"], rows)] if rows else []), _line(text))
