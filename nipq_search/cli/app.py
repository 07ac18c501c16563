"""The commands of `nipq-search` and their options; heavy modules are imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Search for mixed-precision models under several budgets.",
    epilog="Exit codes: 0 success, 1 failure, 2 usage or configuration error, "
    "3 finished but some trials failed, 4 mismatch, 130 interrupted.",
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Sweep file (YAML).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the sweep.")]
Trial = Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="Trial number.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one value of the sweep file."),
]


@app.command()
def run(
    config: Config,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the sweep; default runs/<name>.")
    ] = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Total number of trials over all runs.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="auto|HOST:PORT", help="Address of a running Ray cluster."),
    ] = None,
) -> int:
    """Start or resume a sweep."""
    from nipq_search.cli import run as command

    return command.run(config, out, overrides or [], trials, address)


@app.command()
def submit(
    config: Config,
    address: Annotated[
        str,
        typer.Option(metavar="URL", help="Dashboard of the head, such as http://HEAD:8265."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the sweep on the head; default ~/runs/<name>."
        ),
    ] = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Total number of trials over all runs.")
    ] = None,
) -> int:
    """Start or resume a sweep as a Ray job, whose driver runs on the cluster's head."""
    from nipq_search.cli import run as command

    return command.submit(config, address, out, overrides or [], trials)


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> int:
    """Show layers, reachable costs, budgets and expected effort, without training."""
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
    """Show one trial and its bit-widths by layer."""
    from nipq_search.cli import read

    return read.show(folder, trial, as_json)


@app.command()
def logs(folder: Folder, trial: Trial, as_json: Json = False) -> int:
    """Print the output and traceback of a trial."""
    from nipq_search.cli import read

    return read.logs(folder, trial, as_json)


@app.command()
def best(
    folder: Folder,
    limits: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="COST=NUMBER", help="Upper limit, such as bops=5.3e9."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Find the best trained point within the limits."""
    from nipq_search.cli import read

    return read.best(folder, limits or [], as_json)


@app.command()
def stop(folder: Folder) -> int:
    """Send the driver a stop request; running the same run command again resumes the sweep."""
    from nipq_search.cli import run as command

    return command.stop(folder)


@app.command()
def replay(folder: Folder, trial: Trial, as_json: Json = False) -> int:
    """Rerun one trial from its record and compare the results."""
    from nipq_search.cli import read

    return read.replay(folder, trial, as_json)


@app.command()
def sync(folder: Folder) -> int:
    """Bring the tables, the report and the tracking server up to date."""
    from nipq_search.cli import run as command

    return command.sync(folder)


@app.command()
def gc(
    folder: Folder,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be deleted, without deleting it.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Delete models and checkpoints that are no longer needed."""
    from nipq_search.cli import run as command

    return command.gc(folder, dry_run, as_json)


@app.command()
def report(
    folder: Folder,
    open_it: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> int:
    """Write the self-contained HTML report."""
    from nipq_search.cli import run as command

    return command.report(folder, open_it)


@app.command()
def ui(
    folder: Folder,
    mlflow_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port for MLflow; default 5000, or a free port."),
    ] = None,
    optuna_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port for optuna-dashboard; default 8080, or a free port."
        ),
    ] = None,
) -> int:
    """Serve MLflow and optuna-dashboard for the sweep, on this machine only."""
    from nipq_search.cli import ui as command

    return command.ui(folder, mlflow_port, optuna_port)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Sweep file to check as well.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT", help="Address of a Ray cluster whose nodes are checked."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the nodes must share.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Check the installation, a sweep file's data and storage, and a cluster's nodes."""
    from nipq_search.cli import read

    return read.doctor(config, address, out, as_json)
