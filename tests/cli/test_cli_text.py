"""Formatting of tables, numbers and progress, and parsing of limits."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from cli_documents import FRONT, LAYER, POINT
from rich.console import Console

from nipq_search.cli import numbers, tables
from nipq_search.cli.arguments import check_address, parse_limits
from nipq_search.cli.progress import ProgressLine, ProgressLog, progress_line, progress_sink
from nipq_search.errors import UserError


def render(renderable, width=200):
    screen = Console(file=io.StringIO(), width=width, markup=False)
    screen.print(renderable)
    return screen.file.getvalue()


def nothing(document):
    """Replace every value of `document` with None, except the keys that identify rows."""
    kept = {"trial", "name", "on_front"}
    blank = {}
    for key, value in document.items():
        if isinstance(value, list):
            blank[key] = [nothing(item) for item in value]
        elif key == "point":
            blank[key] = nothing(value)
        else:
            blank[key] = value if key in kept else None
    return blank


def test_the_front_table_shows_points_baselines_and_hypervolumes():
    text = render(tables.front(FRONT))
    lines = text.splitlines()
    (point,) = [line for line in lines if "bops: uniform 4" in line]
    assert point.split()[0] == "3"
    for figure in ("5.25 GBOPs", "24.0 kB", "3.50", "4.25", "0.9123"):
        assert figure in point
    assert any("float model" in line and "300.00 GBOPs" in line for line in lines)
    assert any("LSQ uniform 4" in line and "0.9000" in line for line in lines)
    assert "hypervolume, validation: 0.5000" in text
    assert "hypervolume, test: -" in text
    assert "BOPs convention 1" in text
    assert "1 of 2 finished trials" in text


DOCUMENTS = {
    "front": FRONT,
    "best": {"limits": {"bops": 1e9}, "point": POINT, "nearest": None, "blocks": []},
    "status": {"states": {"FAIL": 1}, "trials": [{"trial": 0, "state": None, "reason": None}]},
    "show": {**POINT, "layers": [LAYER], "params": {"lr": 0.1}},
    "plan": {"layers": [LAYER], "budgets": [{"label": "x", "targets": {"bops": 1.0}}]},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_accept_missing_values(name):
    draw = getattr(tables, name)
    text = render(draw(nothing(DOCUMENTS[name])))
    assert "-" in text
    assert "None" not in text
    assert "None" not in render(draw({}))


def test_show_prints_the_parent_trial():
    assert "started from: trial 0" in render(tables.show({**DOCUMENTS["show"], "parent": 0}))
    assert "started from" not in render(tables.show({**DOCUMENTS["show"], "parent": None}))


def test_tables_print_names_verbatim():
    text = render(tables.layers([{**LAYER, "name": "[bold]stem\x1b[31m"}]))
    assert "[bold]stem?[31m" in text
    assert "float" in text  # the activations have no bits


def test_a_front_by_weight_bytes_has_that_column_once():
    text = render(tables.front({**FRONT, "front_cost": "weight_bytes"}))
    (head,) = [line for line in text.splitlines() if line.startswith("trial")]
    assert head.split().count("weight") == 1


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (numbers.bops, 5.3e9, "5.30 GBOPs"),
        (numbers.bops, 1.2e6, "1.20 MBOPs"),
        (numbers.bops, 12, "12 BOPs"),
        (numbers.kilobytes, 3_000_000, "3,000.0 kB"),
        (numbers.megabytes, 5_000_001, "6 MB"),
        (numbers.metric, 0.98765, "0.9877"),
        (numbers.bits, 4, "4"),
        (numbers.bits, 3.456, "3.46"),
        (numbers.duration, 45.2, "45 s"),
        (numbers.duration, 59.9, "60 s"),
        (numbers.duration, 3599, "1 h 0 min"),
        (numbers.duration, 7500, "2 h 5 min"),
        (numbers.share, 0.982, "98.2 %"),
    ],
)
def test_numbers_are_formatted(function, value, text):
    assert function(value) == text
    assert function(None) == "-"
    assert function(float("nan")) == "-"


def test_limits_are_parsed():
    assert parse_limits(["bops=5.3e9", "weight_bytes = 24_000"]) == {
        "bops": 5.3e9,
        "weight_bytes": 24_000.0,
    }
    assert parse_limits([]) == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["bops"], "COST=NUMBER"),
        (["bops=many"], "'many' is not a positive number"),
        (["bops=nan"], "not a positive number"),
        (["bops=-1"], "not a positive number"),
        (["bops=1", "bops=2"], "given twice"),
    ],
)
def test_wrong_limits_name_the_fix(texts, words):
    with pytest.raises(UserError, match="--max") as caught:
        parse_limits(texts)
    assert words in str(caught.value)


@pytest.mark.parametrize("address", [None, "auto", "10.0.0.5:6379", "head:6379", "[::1]:6379"])
def test_addresses_of_a_cluster(address):
    assert check_address(address) == address


@pytest.mark.parametrize("address", ["head", "head:0", "head:70000", "http://head:8265", ""])
def test_other_addresses_are_rejected(address):
    with pytest.raises(UserError, match="auto or HOST:PORT"):
        check_address(address)


def progress(done=7, **changes):
    figures = {
        "running": 2,
        "failed": 1,
        "total": 20,
        "stage": "trials",
        "best": {"bops: uniform 4": (0.97312, 5.25e9)},
        "seconds_left": 720.0,
        "metric": "accuracy",
        "front_cost": "bops",
    }
    return SimpleNamespace(done=done, **(figures | changes))


def test_the_progress_line():
    assert progress_line(progress()) == (
        "7/20 trials, 2 running, 1 failed, 12 min left, best accuracy: uniform 4 0.9731"
    )
    assert progress_line(progress(best={}, seconds_left=None)) == (
        "7/20 trials, 2 running, 1 failed"
    )
    assert progress_line(progress(stage="float model", best={}, seconds_left=None)) == (
        "float model, 7/20 trials, 2 running, 1 failed"
    )


def test_a_log_gets_occasional_lines_and_every_message():
    stream, now = io.StringIO(), [0.0]
    with ProgressLog(stream, clock=lambda: now[0]) as sink:
        for second in range(25):
            now[0] = float(second)
            sink.update(progress(done=second))
        sink.message("trial 3 COMPLETE")
    lines = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert [line.split("/")[0] for line in lines[:-1]] == ["0", "10", "20"]
    assert lines[-1] == "trial 3 COMPLETE"


def test_a_log_does_not_repeat_itself():
    stream, now = io.StringIO(), [0.0]
    sink = ProgressLog(stream, clock=lambda: now[0])
    for second in (0.0, 20.0, 40.0):
        now[0] = second
        sink.update(progress())
    assert stream.getvalue().count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_live_line_and_permanent_messages(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with progress_sink(stream) as sink:
        assert isinstance(sink, ProgressLine)
        sink.update(progress())
        sink.message("trial 3 COMPLETE")
        sink.update(progress(done=8))
    text = stream.getvalue()
    assert "trial 3 COMPLETE\n" in text
    assert "8/20 trials" in text
    assert "uniform" not in text  # truncated at the edge of the terminal instead of wrapped


def test_dumb_terminals_and_files_get_a_log(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_sink(Terminal()), ProgressLog)
    assert isinstance(progress_sink(io.StringIO()), ProgressLog)
