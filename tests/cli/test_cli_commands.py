"""Exit codes, stdout and stderr of every command, with a fake search layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_documents import DIFFERENCE

from nipq_search.cli import main
from nipq_search.errors import UserError

READING = ["status", "front", "show", "logs", "best", "plan", "doctor", "replay", "gc"]


def arguments(command: str, folder: Path) -> list[str]:
    target = {"plan": ["sweep.yaml"], "doctor": []}.get(command, [str(folder)])
    return [command, *target, *(["3"] if command in ("show", "logs", "replay") else [])]


@pytest.mark.parametrize("command", READING)
def test_json_is_one_document_on_stdout(command, search, capsys):
    assert main([*arguments(command, search.folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1


@pytest.mark.parametrize("command", READING)
def test_text_is_plain_without_a_terminal(command, search, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(arguments(command, search.folder)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a library prints" not in out


def test_non_finite_numbers_are_null(search, capsys):
    assert main(["status", str(search.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_samples"] is None


@pytest.mark.parametrize("command", READING)
def test_a_user_error_is_one_line_and_exits_2(command, search, capsys):
    if command == "doctor":
        command_line = ["doctor", "sweep.yaml"]
    else:
        command_line = arguments(command, search.folder)
    search.error = UserError("train.epoch: unknown key\n(did you mean 'epochs'?)")
    assert main(command_line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last == "error: train.epoch: unknown key (did you mean 'epochs'?)"
    assert "Traceback" not in captured.err


def test_an_unexpected_error_is_one_line_and_debug_shows_more(search, capsys, monkeypatch):
    search.error = KeyError("layer")
    assert main(["front", str(search.folder)]) == 1
    err = capsys.readouterr().err
    assert "error: KeyError: 'layer' (NIPQ_DEBUG=1 shows the traceback)" in err
    assert "Traceback" not in err
    monkeypatch.setenv("NIPQ_DEBUG", "1")
    assert main(["front", str(search.folder)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_package_names_the_fix(search, capsys):
    search.error = ModuleNotFoundError("No module named 'optuna.storages'", name="optuna.storages")
    assert main(["front", str(search.folder)]) == 1
    assert "the package optuna is not installed" in capsys.readouterr().err


def test_ctrl_c_exits_130(search, capsys):
    search.error = KeyboardInterrupt()
    assert main(["front", str(search.folder)]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command_line",
    [
        ["frnt"],
        ["front"],
        ["front", ".", "--jsn"],
        ["show", ".", "one"],
        ["run", "sweep.yaml", "--trials", "0"],
        ["run", "sweep.yaml", "--address", "ray://head:10001"],
        ["run", "sweep.yaml", "--address", "head"],
        ["best", ".", "--max", "bops=many"],
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(command_line, search, capsys):
    assert main(command_line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert search.calls == []


def test_ray_client_addresses_name_the_fix(search, capsys):
    assert main(["run", "sweep.yaml", "--address", "ray://head:10001"]) == 2
    err = capsys.readouterr().err
    assert "run the command on a machine in the cluster, with the address of its head" in err


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ({"state": "finished"}, 0),
        ({"state": "limit", "message": "limits.hours is reached"}, 0),
        ({"failed": 1}, 3),
        ({"complete": 0, "failed": 2, "message": "every trial failed: loss is NaN"}, 1),
        ({"state": "interrupted", "failed": 1}, 130),
    ],
)
def test_exit_codes_of_run(outcome, code, search, capsys, tmp_path):
    search.outcome |= outcome
    assert main(["run", "sweep.yaml", "--out", str(tmp_path / "out")]) == code
    captured = capsys.readouterr()
    assert "ray prints" not in captured.out
    assert "trial 0 COMPLETE" in captured.err
    assert ("BOPs convention 1" in captured.out) == (code in (0, 3))
    assert search.outcome["message"] in captured.err
    if code == 1:
        assert "error: every trial failed: loss is NaN" in captured.err
    if code == 0:
        assert "report.html" in captured.err
        assert "--max bops=5.3e+09" in captured.err


def test_run_passes_its_options_on(search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        "--set",
        "train.epochs=1",
        "--set",
        "seed=3",
        "--trials",
        "5",
        "--address",
        "h:6379",
    ]
    assert main(["run", "sweep.yaml", *options]) == 0
    loaded, ran = search.calls
    assert loaded == ("load_config", Path("sweep.yaml"), ["train.epochs=1", "seed=3"])
    assert ran == ("run_sweep", Path("runs/tiny"), {"trials": 5, "address": "h:6379"})


def test_best_without_a_match_prints_the_nearest_point_and_the_reason(search, capsys):
    nearest = search.best["point"]
    search.best = {"point": None, "nearest": nearest, "blocks": ["bops: the least is 5.25e9"]}
    assert main(["best", str(search.folder), "--max", "bops=1e9"]) == 1
    captured = capsys.readouterr()
    assert "nearest: trial 3" in captured.out
    assert "bops: the least is 5.25e9" in captured.out
    assert "error: no trained point is within bops 1.00 GBOPs" in captured.err


def test_best_reads_limits(search):
    command_line = ["best", str(search.folder), "--max", "bops=5.3e9", "--max"]
    assert main([*command_line, "weight_bytes=24_000"]) == 0
    assert search.calls == [("best", {"bops": 5.3e9, "weight_bytes": 24_000.0})]


def test_doctor_fails_if_a_check_fails(search, capsys):
    search.checks.append({"check": "data", "ok": False, "detail": "no files", "fix": "make data"})
    assert main(["doctor"]) == 1
    assert "no files; make data" in capsys.readouterr().out


def test_logs_are_printed_by_attempt(search, capsys):
    for attempt in (1, 2):
        path = search.folder / "trials" / "3" / f"attempt-{attempt}" / "output.log"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"attempt %d \xff\n" % attempt)
    assert main(["logs", str(search.folder), "3"]) == 0
    out = capsys.readouterr().out
    assert out.index("attempt 1 \ufffd") < out.index("attempt 2 \ufffd")
    assert main(["logs", str(search.folder), "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["logs"]) == 2


def test_logs_of_a_trial_without_output(search, capsys):
    assert main(["logs", str(search.folder), "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "has no output" in captured.err


def test_stop_names_the_driver(search, capsys):
    assert main(["stop", str(search.folder)]) == 0
    assert "no driver is running" in capsys.readouterr().err
    search.driver = "here 7"
    assert main(["stop", str(search.folder)]) == 0
    assert "(here 7)" in capsys.readouterr().err


def test_report_prints_its_path_and_opens_it(search, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    assert main(["report", str(search.folder), "--open"]) == 0
    path = search.folder / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert opened == [path.as_uri()]


def test_a_closed_pipe_is_not_a_failure():
    """As with `| head` on a long output, except that the reader exits before the first write."""
    reader, writer = os.pipe()
    os.close(reader)
    program = (
        "import sys; from nipq_search.cli.output import emit_text, emit_json;"
        "emit_text('x' * 1_000_000); emit_json({'schema': 1}); sys.exit(3)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 3


def test_a_replay_that_differs_exits_4(search, capsys):
    search.replayed = {"equal": False, "differences": [DIFFERENCE]}
    assert main(["replay", str(search.folder), "3"]) == 4
    out = capsys.readouterr().out
    assert "trial 3: the replay did not match the recorded trial" in out and "steps" in out


def test_gc_lists_what_is_deleted(search, capsys):
    assert main(["gc", str(search.folder), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "54,321 bytes would be freed, 1 models kept" in out and "trials/1/model.pt" in out
    assert main(["gc", str(search.folder)]) == 0
    assert "54,321 bytes freed" in capsys.readouterr().out


def test_sync_prints_the_server_and_the_number_of_trials(search, capsys):
    assert main(["sync", str(search.folder)]) == 0
    assert "http://server is up to date: 2 trials" in capsys.readouterr().err
