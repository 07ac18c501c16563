"""The commands of `nipq-search` and their options. Nothing heavy is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Mixed-precision models for several budgets from one command.",
    epilog="Exit codes: 0 fine, 1 failure, 2 usage or configuration, "
    "3 finished but some trials failed, 4 a mismatch, 130 interrupted.",
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The sweep file (YAML).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The sweep's folder.")]
Trial = Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="The trial's number.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change one value of the sweep file."),
]


@app.command()
def run(
    config: Config,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The sweep's folder; else runs/<name>.")
    ] = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Trials in total, over all runs.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="auto|HOST:PORT", help="A running Ray cluster to work on."),
    ] = None,
) -> int:
    """Start a sweep, or resume it."""
    from nipq_search.cli import run as command

    return command.run(config, out, overrides or [], trials, address)


@app.command()
def submit(
    config: Config,
    address: Annotated[
        str, typer.Option(metavar="URL", help="The head's dashboard, such as http://HEAD:8265.")
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The sweep's folder on the head; else ~/runs/<name>."),
    ] = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Trials in total, over all runs.")
    ] = None,
) -> int:
    """Start or resume a sweep as a Ray job: its driver runs on the cluster's head."""
    from nipq_search.cli import run as command

    return command.submit(config, address, out, overrides or [], trials)


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> int:
    """Show layers, reachable costs, budgets and work ahead, without training."""
    from nipq_search.cli import read

    return read.plan(config, overrides or [], as_json)


@app.command()
def status(folder: Folder, as_json: Json = False) -> int:
    """Show the states of the trials."""
    from nipq_search.cli import read

    return read.status(folder, as_json)


@app.command()
def front(folder: Folder, as_json: Json = False) -> int:
    """Show the Pareto front."""
    from nipq_search.cli import read

    return read.front(folder, as_json)


@app.command()
def show(folder: Folder, trial: Trial, as_json: Json = False) -> int:
    """Show one trial and its bits by layer."""
    from nipq_search.cli import read

    return read.show(folder, trial, as_json)


@app.command()
def logs(folder: Folder, trial: Trial, as_json: Json = False) -> int:
    """Print a trial's output and traceback."""
    from nipq_search.cli import read

    return read.logs(folder, trial, as_json)


@app.command()
def best(
    folder: Folder,
    limits: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="COST=NUMBER", help="A limit, such as bops=5.3e9."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Find the best trained point inside limits."""
    from nipq_search.cli import read

    return read.best(folder, limits or [], as_json)


@app.command()
def stop(folder: Folder) -> int:
    """Ask the sweep's driver to stop; the same run resumes."""
    from nipq_search.cli import run as command

    return command.stop(folder)


@app.command()
def replay(folder: Folder, trial: Trial, as_json: Json = False) -> int:
    """Run one trial again from its record and compare it bit by bit."""
    from nipq_search.cli import read

    return read.replay(folder, trial, as_json)


@app.command()
def sync(folder: Folder) -> int:
    """Send the tracking server what it lacks of the sweep."""
    from nipq_search.cli import run as command

    return command.sync(folder)


@app.command()
def gc(
    folder: Folder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show it, delete nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Free the space of what no front member, parent or open trial needs."""
    from nipq_search.cli import run as command

    return command.gc(folder, dry_run, as_json)


@app.command()
def report(
    folder: Folder,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> int:
    """Write the self-contained HTML report."""
    from nipq_search.cli import run as command

    return command.report(folder, open_it)


@app.command()
def ui(
    folder: Folder,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of MLflow; else a free one.")
    ] = None,
    optuna_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of optuna-dashboard; else a free one."),
    ] = None,
) -> int:
    """Open MLflow and optuna-dashboard on the sweep, on this machine only."""
    from nipq_search.cli import ui as command

    return command.ui(folder, mlflow_port, optuna_port)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A sweep file to check as well.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="auto|HOST:PORT", help="A Ray cluster whose nodes to check."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder that its nodes must share.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Check the installation, a sweep file's data and storage, and a cluster's nodes."""
    from nipq_search.cli import read

    return read.doctor(config, address, out, as_json)
