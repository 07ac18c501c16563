"""The commands that modify a sweep: `run`, `submit`, `stop`, `sync`, `gc` and `report`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipq_search.cli.arguments import check_address
from nipq_search.cli.exit_codes import FAILURE, INTERRUPTED, SOME_FAILED, SUCCESS
from nipq_search.cli.output import (
    emit_json,
    emit_table,
    emit_text,
    library_output_on_stderr,
    print_message,
)
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
    """Start or resume a sweep, then print its front and the next commands.

    Args:
        config: the sweep file.
        out: the sweep's folder; defaults to `runs/<name>`.
        overrides: values of `--set`, as `A.B=C`.
        trials: total number of trials over all runs; None uses `search.trials`.
        address: address of a Ray cluster; None starts a cluster on this machine.

    Returns:
        The exit code.

    Raises:
        UserError: the sweep file is invalid, or a check before the first job failed.
        RuntimeError: the sweep could not be completed; see `run_sweep`.
    """
    address = check_address(address)
    with library_output_on_stderr():
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
        print_message(outcome.message or "stopped; run the same command again to resume the sweep")
        return code
    document = _front_document(folder) if outcome.complete else None
    if document is not None:
        from nipq_search.cli import tables

        emit_table(tables.front(document))
    if outcome.message:
        print_message(f"error: {outcome.message}" if code == FAILURE else outcome.message)
    for line in next_steps(folder, outcome.failed, document):
        print_message(line)
    return code


def submit(
    config: Path, address: str, out: str | None, overrides: Sequence[str], trials: int | None
) -> int:
    """Submit a sweep to a cluster as a Ray job; print its ID and commands to follow and stop it.

    Args:
        config: the sweep file.
        address: URL of the head's dashboard.
        out: the sweep's folder on the head; defaults to `~/runs/<name>`.
        overrides: values of `--set`, as `A.B=C`.
        trials: total number of trials over all runs; None uses `search.trials`.

    Returns:
        The exit code.

    Raises:
        UserError: the sweep file, the address or `out` is invalid, no dashboard accepts jobs at
            the address, or `ray[default]` is not installed.
    """
    with library_output_on_stderr():
        from nipq_search.search.commands.submit import submit as send
        from nipq_search.search.config.sweep_config import load_config

        loaded = load_config(config, overrides)
        job = send(config, loaded, address, out=out, overrides=overrides, trials=trials)
    emit_text(f"{job}\n")
    shown = shlex.quote(address)
    for line in (
        "next steps:",
        f"  ray job logs --follow {job} --address {shown}",
        f"  ray job stop {job} --address {shown}",
    ):
        print_message(line)
    return SUCCESS


def exit_code(outcome: Outcome) -> int:
    """Return the exit code of a run: 0, 1 (all trials failed), 3 (some failed) or 130."""
    if outcome.state == "interrupted":
        return INTERRUPTED
    if outcome.failed:
        return SOME_FAILED if outcome.complete else FAILURE
    return SUCCESS


def _front_document(folder: Path) -> dict[str, Any]:
    with library_output_on_stderr():
        from nipq_search.search.results.sweep import Sweep

        return Sweep.open(folder).front_document()


def next_steps(folder: Path, failed: int, front: Mapping[str, Any] | None) -> list[str]:
    """List the commands that a user may want to run next.

    Args:
        folder: the sweep's folder.
        failed: number of failed trials.
        front: the front document; None if no trial is COMPLETE.

    Returns:
        Lines for stderr.
    """
    lines = []
    shown = shlex.quote(str(folder))
    if failed:
        lines.append(
            f"{failed} failed: nipq-search status {shown} shows the reasons, and "
            f"nipq-search logs {shown} TRIAL shows a trial's output"
        )
    if front is not None:
        lines += [
            "next steps:",
            f"  {shlex.quote(str(folder / 'report.html'))}",
            f"  nipq-search ui {shown}",
            f"  nipq-search best {shown} --max {_example_limit(front)}",
        ]
    return lines


def _example_limit(front: Mapping[str, Any]) -> str:
    """Return an example value of `--max`: a limit that the middle point of the front satisfies."""
    name = front.get("front_cost") or "bops"
    costs = sorted(
        point["cost"][name] for point in front.get("points") or [] if point.get("on_front")
    )
    # Add 1 % to the cost, because formatting with three digits may round it down.
    return f"{name}={1.01 * costs[len(costs) // 2]:.3g}" if costs else f"{name}=NUMBER"


def stop(folder: Path) -> int:
    """Send the sweep's driver a request to save checkpoints and stop.

    Running the same `run` command again resumes the sweep.
    """
    with library_output_on_stderr():
        from nipq_search.search.jobs.lease import request_stop
        from nipq_search.search.results.sweep import Sweep

        # A driver that has just started holds the lease but has not yet written the sweep's files.
        driver = request_stop(folder) or request_stop(Sweep.open(folder).folder)
    if driver is None:
        print_message(f"nothing to stop: no driver is running on {folder}")
    else:
        print_message(
            f"sent a stop request to the driver ({driver}); run the same run command again to "
            "resume the sweep"
        )
    return SUCCESS


def sync(folder: Path) -> int:
    """Bring the tables, the front, the report and the tracking server up to date."""
    with library_output_on_stderr():
        from nipq_search.search.results.outputs import sync as bring_up_to_date

        done = bring_up_to_date(folder)
    print_message(f"{done['server']} is up to date: {done['trials']} trials")
    return SUCCESS


def gc(folder: Path, dry_run: bool, as_json: bool) -> int:
    """Delete models and checkpoints that are no longer needed.

    Args:
        folder: the sweep's folder.
        dry_run: only list what would be deleted.
        as_json: print JSON instead of a table.

    Returns:
        The exit code.

    Raises:
        UserError: the folder is not a sweep, or a driver is running it.
        RuntimeError: a file or object could not be deleted.
    """
    with library_output_on_stderr():
        from nipq_search.search.results.retention import collect

        document = collect(folder, dry_run)
    if as_json:
        emit_json(document)
    else:
        from nipq_search.cli import tables

        emit_table(tables.gc(document))
    return SUCCESS


def report(folder: Path, open_it: bool) -> int:
    """Write the sweep's report, print its path, and open it in a browser if `open_it` is set."""
    with library_output_on_stderr():
        from nipq_search.search.results.sweep import Sweep

        path = Sweep.open(folder).write_report()
    emit_text(f"{path}\n")
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            print_message("no browser found; open the file manually")
    return SUCCESS
