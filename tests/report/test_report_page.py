from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from typing import Any

import plotly.graph_objects as go
import pytest

from nipq_search.records import Baseline
from nipq_search.report import FIGURES, ReportData, render
from nipq_search.report.bits import document
from nipq_search.report.data import embed, format_number, label, number, text
from nipq_search.report.pareto import baselines, budget_targets, figure, log2_axis


def page(data: ReportData) -> str:
    return render(data.sweep, data.results, data.curves, data.layers)


def with_front(data: ReportData, **changes: Any) -> ReportData:
    front = {**data.sweep.front, **changes}
    return dataclasses.replace(data, sweep=dataclasses.replace(data.sweep, front=front))


class Outline(html.parser.HTMLParser):
    """Collect references to external resources, and unclosed tags."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]
        self.outside += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_renders_with_and_without_data(
    name: str, data: ReportData, nothing: ReportData
) -> None:
    missing = [{**point, "validation": None, "cost": None} for point in data.points()]
    bare = with_front(data, points=missing, float=None, baselines=[{"bits": 8, "cost": None}])
    for case in (data, nothing, bare, dataclasses.replace(data, layers={})):
        piece = FIGURES[name](case)
        outline = Outline()
        outline.feed(piece)
        assert outline.open == []
        assert outline.outside == []
        assert not re.search(r"[:,\[]NaN|>(nan|None|<NA>)<", piece)


def test_the_page_is_well_formed_and_self_contained(data: ReportData) -> None:
    whole = page(data)
    outline = Outline()
    outline.feed(whole)
    assert outline.open == []
    assert outline.outside == []
    assert "0.8125" in whole
    assert len(whole) < 6e6


def test_a_page_without_a_finished_trial(nothing: ReportData) -> None:
    whole = page(nothing)
    assert "No trial has finished yet" in whole
    assert "loss became NaN at step 7" in whole


def test_text_with_markup_is_escaped(data: ReportData) -> None:
    name = "</title><script>alert(1)</script>"
    sweep = dataclasses.replace(data.sweep, name=name, config={"x": name}, metric=name)
    results = data.results.assign(budget_label=name)
    layers = {0: [{"name": name, "kind": name, "weight_bits": 3, "activation_bits": 3}]}
    points = [{**point, "budget_label": name} for point in data.points()]
    sweep = dataclasses.replace(sweep, front={**sweep.front, "points": points})
    whole = render(sweep, results, data.curves, layers)
    assert name not in whole
    assert "<script>alert" not in whole
    assert "<script>window.hacked" not in whole
    assert "&lt;/script&gt;&lt;script&gt;window.hacked" in whole
    found = re.search(r'id="bits-data">(.*?)</script>', whole, re.S)
    assert found is not None
    known = json.loads(found[1])
    assert known["trials"]["0"]["layers"][0]["name"] == label(name)


def test_the_scatter_is_a_valid_plotly_figure(data: ReportData, nothing: ReportData) -> None:
    for case in (data, nothing):
        go.Figure(figure(case))
    traces = {trace.get("name"): trace for trace in figure(data)["data"]}
    assert traces["front"]["x"] == sorted(traces["front"]["x"])
    assert len(traces["front"]["x"]) == 3
    assert traces["bops: uniform 4"]["customdata"] == [0, 1]
    filled, hollow = traces["bops: uniform 4"]["marker"]["color"]
    assert filled.startswith("#") and hollow.startswith("rgba")
    assert traces["uniform LSQ"]["text"] == [" 4 bits", " 8 bits"]
    notes = {note["text"] for note in figure(data)["layout"]["annotations"]}
    assert notes >= {"float model 0.912", "bops: uniform 4", "bops: uniform 2.5"}


def test_budgets_of_another_cost_draw_no_line(data: ReportData) -> None:
    assert budget_targets(data) == {
        "bops: uniform 4": 16e6,
        "bops: uniform 3": 9e6,
        "bops: uniform 2.5": 6.25e6,
    }
    assert budget_targets(with_front(data, front_cost="weight_bytes")) == {}


def test_baselines_come_from_the_sweep_if_the_front_has_none(data: ReportData) -> None:
    lsq = Baseline(bits=4, validation=0.8, test=None, cost={"bops": 1e6}, samples=1, seconds=1.0)
    sweep = dataclasses.replace(data.sweep, baselines=(lsq,))
    front = {key: value for key, value in sweep.front.items() if key != "baselines"}
    changed = dataclasses.replace(data, sweep=dataclasses.replace(sweep, front=front))
    assert [found["bits"] for found in baselines(changed)] == [4]


def test_ticks_of_the_cost_axis_double() -> None:
    axis = log2_axis([0.6e9, 5e9])
    ticks = axis["tickvals"]
    assert {b / a for a, b in zip(ticks, ticks[1:], strict=False)} == {2.0}
    assert "1 G" in axis["ticktext"]
    assert log2_axis([])["range"][0] < log2_axis([])["range"][1]
    assert log2_axis([7.0])["range"][0] < math.log10(7) < log2_axis([7.0])["range"][1]


def test_the_best_trial_of_the_front_is_selected_first(
    data: ReportData, nothing: ReportData
) -> None:
    assert data.best() == 0
    least = dataclasses.replace(data, sweep=dataclasses.replace(data.sweep, mode="min"))
    assert least.best() == 3
    assert nothing.best() is None
    assert dataclasses.replace(nothing, layers={7: []}).best() == 7


def test_a_layer_in_floating_point_has_no_bits(data: ReportData) -> None:
    layers = document(data)["trials"][2]["layers"]
    assert [layer["weight_bits"] for layer in layers] == [4, 5, 6, None]
    assert document(data)["trials"][2]["caption"].startswith("trial 2 · bops: uniform 3 · ")


def test_helpers() -> None:
    assert [format_number(v) for v in (5.3e9, 24_000, 0.91234, None, math.nan, 9999)] == [
        "5.3 G",
        "24 k",
        "0.9123",
        "–",
        "–",
        "9999",
    ]
    assert number("x") is None and number(math.inf) is None and number(3) == 3.0
    assert text(None) == "" and text(math.nan) == "" and text(0) == "0"
    piece = embed("a", {"x": [math.nan, "</script>"]})
    assert piece.count("<") == 2
    assert json.loads(piece[piece.index(">") + 1 : piece.rindex("<")]) == {
        "x": [None, "</script>"]
    }
