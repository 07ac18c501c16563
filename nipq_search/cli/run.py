"""`run`, `submit`, `stop`, `sync`, `gc`, `report`: the commands that change a sweep's folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipq_search.cli.arguments import check_address
from nipq_search.cli.exit_codes import FAILURE, FINE, INTERRUPTED, SOME_FAILED
from nipq_search.cli.output import chatter_on_stderr, emit_json, emit_table, emit_text, say
from nipq_search.cli.progress import progress_sink

if TYPE_CHECKING:
    from nipq_search.search.run import Outcome


def run(
    config: Path,
    out: Path | None,
    overrides: Sequence[str],
    trials: int | None,
    address: str | None,
) -> int:
    """Start or resume a sweep, then print its front and where to look next."""
    address = check_address(address)
    with chatter_on_stderr():
        from nipq_search.search.config.sweep_config import load_config
        from nipq_search.search.run import run_sweep

        sweep_config = load_config(config, overrides)
        folder = out or Path("runs") / sweep_config.name
        with progress_sink() as progress:
            outcome = run_sweep(
                sweep_config, folder, trials=trials, address=address, progress=progress
            )
    code = exit_code(outcome)
    if code == INTERRUPTED:
        say(outcome.message or "stopped; the same command resumes")
        return code
    document = _front_document(folder) if outcome.complete else None
    if document is not None:
        from nipq_search.cli import tables

        emit_table(tables.front(document))
    if outcome.message:
        say(f"error: {outcome.message}" if code == FAILURE else outcome.message)
    for line in next_steps(folder, outcome.failed, document):
        say(line)
    return code


def submit(
    config: Path, address: str, out: str | None, overrides: Sequence[str], trials: int | None
) -> int:
    """Hand a sweep to a cluster as a job, and say how to follow it."""
    with chatter_on_stderr():
        from nipq_search.search.commands.submit import submit as send
        from nipq_search.search.config.sweep_config import load_config

        loaded = load_config(config, overrides)
        job = send(config, loaded, address, out=out, overrides=overrides, trials=trials)
    emit_text(f"{job}\n")
    shown = shlex.quote(address)
    for line in (
        "look next:",
        f"  ray job logs --follow {job} --address {shown}",
        f"  ray job stop {job} --address {shown}",
    ):
        say(line)
    return FINE


def exit_code(outcome: Outcome) -> int:
    """What an outcome means to a shell: 0, 1 (every trial failed), 3 (some did) or 130."""
    if outcome.state == "interrupted":
        return INTERRUPTED
    if outcome.failed:
        return SOME_FAILED if outcome.complete else FAILURE
    return FINE


def _front_document(folder: Path) -> dict[str, Any]:
    with chatter_on_stderr():
        from nipq_search.search.results.sweep import Sweep

        return Sweep.open(folder).front_document()


def next_steps(folder: Path, failed: int, front: Mapping[str, Any] | None) -> list[str]:
    """Where to look after a run: at failed trials, and at the front if there is one."""
    lines = []
    shown = shlex.quote(str(folder))
    if failed:
        lines.append(
            f"{failed} failed: nipq-search status {shown} says why, "
            f"nipq-search logs {shown} TRIAL shows a trial's output"
        )
    if front is not None:
        lines += [
            "look next:",
            f"  {shlex.quote(str(folder / 'report.html'))}",
            f"  nipq-search ui {shown}",
            f"  nipq-search best {shown} --max {_example_limit(front)}",
        ]
    return lines


def _example_limit(front: Mapping[str, Any]) -> str:
    """A limit that the middle of the front keeps."""
    name = front.get("front_cost") or "bops"
    costs = sorted(
        point["cost"][name] for point in front.get("points") or [] if point.get("on_front")
    )
    # 1 % more, for three digits may round down.
    return f"{name}={1.01 * costs[len(costs) // 2]:.3g}" if costs else f"{name}=NUMBER"


def stop(folder: Path) -> int:
    """Ask the sweep's driver to stop; it checkpoints, and the same `run` resumes."""
    with chatter_on_stderr():
        from nipq_search.search.jobs.lease import request_stop
        from nipq_search.search.results.sweep import Sweep

        # A driver that has just begun holds the folder before there is a sweep in it.
        driver = request_stop(folder) or request_stop(Sweep.open(folder).folder)
    if driver is None:
        say(f"nothing to stop: no driver is running on {folder}")
    else:
        say(f"asked the driver ({driver}) to stop; the same run command resumes the sweep")
    return FINE


def sync(folder: Path) -> int:
    """Bring tables, report and tracking server up to date; 1 where the server is away."""
    with chatter_on_stderr():
        from nipq_search.search.results.outputs import sync as bring_up_to_date

        done = bring_up_to_date(folder)
    say(f"{done['server']} has all of the sweep: {done['trials']} trials")
    return FINE


def gc(folder: Path, dry_run: bool, as_json: bool) -> int:
    """Delete models and checkpoints that nothing needs."""
    with chatter_on_stderr():
        from nipq_search.search.results.retention import collect

        document = collect(folder, dry_run)
    if as_json:
        emit_json(document)
    else:
        from nipq_search.cli import tables

        emit_table(tables.gc(document))
    return FINE


def report(folder: Path, open_it: bool) -> int:
    """Write the sweep's report and print where it is."""
    with chatter_on_stderr():
        from nipq_search.search.results.sweep import Sweep

        path = Sweep.open(folder).write_report()
    emit_text(f"{path}\n")
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            say("no browser was found; open the file yourself")
    return FINE
