"""The figure with bits over time, and the detection of unmoved bit-widths."""

from __future__ import annotations

import json
import re
from typing import Any

from nipq_search.report import ReportData
from nipq_search.report.movement import never_moved, section


def history(*rows: tuple[int, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {"step": step, "bits": bits, "gradient": {name: -0.1 for name in bits}}
        for step, bits in rows
    ]


MOVED = history((0, {"a": 4.0, "b": 4.0}), (5, {"a": 4.5, "b": 4.01}), (9, {"a": 3.9, "b": 4.0}))


def test_a_bit_width_that_returned_to_its_start_has_moved() -> None:
    assert never_moved(MOVED) == ["b"]
    back = history((0, {"a": 4.0}), (5, {"a": 4.5}), (9, {"a": 4.0}))
    assert never_moved(back) == []


def test_without_a_noise_phase_nothing_is_reported() -> None:
    assert never_moved([]) == never_moved(MOVED[:1]) == []


def test_the_figure_has_a_line_for_each_tensor(data: ReportData) -> None:
    assert section(data) == "", "no trial has a history"
    hostile = "</script><b>x</b>"
    known = ReportData(
        sweep=data.sweep,
        results=data.results,
        curves=data.curves,
        layers=data.layers,
        histories={
            3: [*MOVED],
            4: MOVED[:1],
            5: history((0, {hostile: 2.0}), (1, {hostile: 2.0})),
        },
    )
    text = section(known)
    assert hostile not in text
    document = json.loads(
        re.search(r"<script[^>]*movement-data[^>]*>(.*?)</script>", text, re.S)[1]
    )
    assert set(document["trials"]) == {"3", "5"}
    trial = document["trials"]["3"]
    assert trial["steps"] == [0, 5, 9]
    assert trial["bits"] == {"a": [4.0, 4.5, 3.9], "b": [4.0, 4.01, 4.0]}
    assert trial["gradient"]["a"] == [-0.1] * 3
    assert trial["hint"].startswith("1 of 2 bit-widths never moved: b.")
