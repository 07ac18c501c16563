"""The commands that do not modify a sweep: each prints a document, or files of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipq_search.cli import numbers, tables
from nipq_search.cli.arguments import check_address, parse_limits
from nipq_search.cli.exit_codes import FAILURE, MISMATCH, SUCCESS
from nipq_search.cli.output import (
    emit_json,
    emit_table,
    emit_text,
    library_output_on_stderr,
    print_message,
)
from nipq_search.errors import UserError
from nipq_search.records import SCHEMA

if TYPE_CHECKING:
    from rich.console import RenderableType

    from nipq_search.search.results.sweep import Sweep

_READ_BYTES = 1 << 20


def _sweep(folder: Path) -> Sweep:
    from nipq_search.search.results.sweep import Sweep

    return Sweep.open(folder)


def _print(
    document: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], RenderableType]
) -> None:
    if as_json:
        emit_json(document)
    else:
        emit_table(table(document))


def plan(config: Path, overrides: Sequence[str], as_json: bool) -> int:
    """Print the layers, reachable costs, budgets and expected effort of a sweep file.

    Args:
        config: the sweep file.
        overrides: values of `--set`, as `A.B=C`.
        as_json: print JSON instead of tables.

    Returns:
        The exit code.

    Raises:
        UserError: the sweep file is invalid, or `run` would reject it.
    """
    with library_output_on_stderr():
        from nipq_search.search.commands.plan import plan as make_plan
        from nipq_search.search.config.sweep_config import load_config

        document = make_plan(load_config(config, overrides))
    _print(document, as_json, tables.plan)
    return SUCCESS


def status(folder: Path, as_json: bool) -> int:
    """Print the driver and the stage of a sweep, and the states of its trials."""
    with library_output_on_stderr():
        document = _sweep(folder).status()
    _print(document, as_json, tables.status)
    return SUCCESS


def front(folder: Path, as_json: bool) -> int:
    """Print the current Pareto front, the float model and the baselines."""
    with library_output_on_stderr():
        document = _sweep(folder).front_document()
    _print(document, as_json, tables.front)
    return SUCCESS


def show(folder: Path, trial: int, as_json: bool) -> int:
    """Print one trial and its bit-widths by layer.

    Args:
        folder: the sweep's folder.
        trial: number of the trial.
        as_json: print JSON instead of tables.

    Returns:
        The exit code.

    Raises:
        UserError: the folder is not a sweep, or the trial does not exist.
    """
    with library_output_on_stderr():
        document = _sweep(folder).show(trial)
    _print(document, as_json, tables.show)
    return SUCCESS


def best(folder: Path, limit_texts: Sequence[str], as_json: bool) -> int:
    """Print the best trained point within the limits, or the nearest point if there is none.

    Args:
        folder: the sweep's folder.
        limit_texts: values of `--max`, as COST=NUMBER.
        as_json: print JSON instead of tables.

    Returns:
        The exit code, which is 1 if no point satisfies the limits.

    Raises:
        UserError: the folder is not a sweep, or a limit is invalid.
    """
    limits = parse_limits(limit_texts)
    with library_output_on_stderr():
        document = _sweep(folder).best(limits)
    _print(document, as_json, tables.best)
    if document.get("point") is not None:
        return SUCCESS
    if document.get("nearest") is not None:
        print_message(f"error: no trained point is within {numbers.costs(limits)}")
    return FAILURE


def logs(folder: Path, trial: int, as_json: bool) -> int:
    """Print the output, tracebacks and stack dumps of one trial, attempt by attempt.

    Args:
        folder: the sweep's folder.
        trial: number of the trial.
        as_json: print JSON instead of text.

    Returns:
        The exit code.

    Raises:
        UserError: the folder is not a sweep, or the trial does not exist.
    """
    with library_output_on_stderr():
        files = _sweep(folder).log_files(trial)
    if as_json:
        entries = [{"file": str(file), "text": file.read_text(errors="replace")} for file in files]
        emit_json({"schema": SCHEMA, "trial": trial, "logs": entries})
        return SUCCESS
    for file in files:
        emit_text(f"==> {file} <==\n")
        with file.open(encoding="utf-8", errors="replace") as stream:
            while chunk := stream.read(_READ_BYTES):
                emit_text(chunk)
    if not files:
        print_message(f"trial {trial} has no output")
    return SUCCESS


def replay(folder: Path, trial: int, as_json: bool) -> int:
    """Rerun one trial from its record and print whether the results match.

    Args:
        folder: the sweep's folder.
        trial: number of the trial.
        as_json: print JSON instead of tables.

    Returns:
        The exit code, which is 4 if the replay does not match the record.

    Raises:
        UserError: the folder is not a sweep, or the trial cannot be replayed.
    """
    with library_output_on_stderr():
        from nipq_search.search.commands.replay import replay as run_again

        document = run_again(_sweep(folder), trial, print_message)
    _print(document, as_json, tables.replay)
    return SUCCESS if document["equal"] else MISMATCH


def doctor(config: Path | None, address: str | None, out: Path | None, as_json: bool) -> int:
    """Check the installation, and optionally a sweep file and a cluster.

    Args:
        config: if given, also check the data and storage of this sweep file.
        address: if given, also check every node of the Ray cluster at this address.
        out: the folder that all nodes must share; defaults to the current folder.
        as_json: print JSON instead of a table.

    Returns:
        The exit code, which is 1 if a check failed.

    Raises:
        UserError: `out` is given without `address`, or the address or the sweep file is invalid.
    """
    address = check_address(address)
    if out is not None and address is None:
        raise UserError(
            "--out: the folder that all nodes must share; give it together with --address"
        )
    with library_output_on_stderr():
        from nipq_search.search.checks.doctor import doctor as run_checks

        loaded = None
        if config is not None:
            from nipq_search.search.config.sweep_config import load_config

            loaded = load_config(config)
        checks = run_checks(loaded, address, out)
    healthy = all(check.get("ok") for check in checks)
    document = {"schema": SCHEMA, "ok": healthy, "checks": checks}
    _print(document, as_json, lambda found: tables.doctor(found["checks"]))
    return SUCCESS if healthy else FAILURE
