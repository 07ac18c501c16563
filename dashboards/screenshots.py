"""Screenshots of the dashboards for `dashboards/README.md` and the project's README.

    python dashboards/screenshots.py runs/digits --out dashboards/images

Starts `mlflow ui` and `optuna-dashboard` in the sweep's folder, takes screenshots with Debian's
Chromium, and terminates both. Ray's dashboard exists only while Ray runs, so it is captured only
if `--ray-url` gives its address. Requests to other machines are blocked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from playwright.sync_api import BrowserContext, Page, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeout
from servers import free_port, mlflow_command, optuna_command, serve

CHROMIUM = "/usr/bin/chromium"
# `tests/report/test_report_browser.py` uses the same arguments.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WINDOW = {"width": 1400, "height": 900}
LARGEST_BYTES = 300_000
"""Size of a screenshot above which a note is printed."""

MOST_COMPARED = 30
"""Maximum number of trials in the screenshot of a comparison."""

COLUMNS = [
    "metrics.`validation`",
    "metrics.`cost_bops`",
    "metrics.`cost_weight_bytes`",
    "tags.`budget`",
    "tags.`on_front`",
    "params.`lambda`",
]
"""Columns shown in MLflow's table: those listed in dashboards/README.md except `lr`."""


def main() -> int:
    """Take all screenshots available for the sweep; print the path and size of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a sweep")
    parser.add_argument("--out", type=Path, default=Path("dashboards/images"))
    parser.add_argument("--ray-url", help="address of a running Ray dashboard")
    arguments = parser.parse_args()
    folder, out = arguments.folder.resolve(), arguments.out
    if not (folder / "mlflow.db").is_file():
        print(f"error: {folder} has no mlflow.db; give the folder of a sweep", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    with browser() as context:
        take_report(context, folder, out)
        take_mlflow(context, folder, out)
        take_optuna(context, folder, out)
        if arguments.ray_url:
            take_ray(context, arguments.ray_url, out)
    return 0


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """Start Chromium with access to files and servers on this machine only."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or CHROMIUM
        chromium = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        context = chromium.new_context(viewport=WINDOW)  # type: ignore[arg-type]
        context.route(lambda url: not _local(url), lambda route: route.abort())
        try:
            yield context
        finally:
            chromium.close()


def take_report(context: BrowserContext, folder: Path, out: Path) -> None:
    """Take a screenshot of the top of the report, and one of its Pareto figure alone.

    Args:
        context: the browser.
        folder: folder of the sweep. If it has no `report.html`, only a note is printed.
        out: folder of the screenshots.
    """
    path = folder / "report.html"
    if not path.is_file():
        print(f"{path} is missing; run `nipq-search report {folder}`", file=sys.stderr)
        return
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("#pareto .plot-container")
    save(page, out / "report.png")
    pareto = page.locator("section", has=page.locator("#pareto"))
    save(page, out / "pareto.png", pareto.screenshot)
    page.close()


def take_mlflow(context: BrowserContext, folder: Path, out: Path) -> None:
    """Take screenshots of the table of runs, the charts, and the comparison of finished trials.

    Args:
        context: the browser.
        folder: folder of the sweep, which must contain `mlflow.db`.
        out: folder of the screenshots.

    Raises:
        RuntimeError: MLflow's server does not respond.
    """
    port = free_port()
    with serve(mlflow_command(port), port, folder) as address:
        found = _mlflow(address, "experiments/search", {"max_results": 100})["experiments"]
        experiment = next(e for e in found if e["name"] == "nipq_search")["experiment_id"]
        query = {"experiment_ids": [experiment], "max_results": 1000}
        runs = _mlflow(address, "runs/search", query).get("runs", [])
        tags = {run["info"]["run_id"]: _tags(run) for run in runs}
        parents = [run for run, found in tags.items() if "nipq.trial" not in found]
        complete = [run for run, found in tags.items() if found.get("nipq.state") == "COMPLETE"]
        context.add_init_script(_mlflow_view(experiment, parents))

        table = f"{address}/#/experiments/{experiment}/runs"
        by_metric = f"?orderByKey={quote('metrics.`validation`')}&orderByAsc=false"
        compared = {
            "runs": json.dumps(complete[:MOST_COMPARED]),
            "experiments": json.dumps([experiment]),
        }
        pages = {
            "mlflow-runs": f"{table}{by_metric}",
            "mlflow-charts": f"{table}?compareRunsMode=CHART",
            "mlflow-compare": f"{address}/#/compare-runs?{urlencode(compared)}",
        }
        for name, url in pages.items():
            arrange = _compare_validation if name == "mlflow-compare" else None
            take(context, url, out / f"{name}.png", arrange)


def take_optuna(context: BrowserContext, folder: Path, out: Path) -> None:
    """Take screenshots of the study and its Pareto front, and of the hyperparameter analysis.

    Args:
        context: the browser.
        folder: folder of the sweep. If it has no study file, only a note is printed.
        out: folder of the screenshots.

    Raises:
        RuntimeError: optuna-dashboard's server does not respond.
    """
    study = next((name for name in ("study.log", "study.db") if (folder / name).is_file()), None)
    if study is None:
        print(f"no study.log or study.db in {folder}; skipping Optuna", file=sys.stderr)
        return
    port = free_port()
    with serve(optuna_command(study, port), port, folder) as address:
        answer = json.loads(_fetch(f"{address}/api/studies"))
        number = answer["study_summaries"][0]["study_id"]
        take(context, f"{address}/dashboard/studies/{number}", out / "optuna-study.png")
        analytics = f"{address}/dashboard/studies/{number}/analytics"
        take(context, analytics, out / "optuna-parameters.png")


def take_ray(context: BrowserContext, address: str, out: Path) -> None:
    """Take screenshots of Ray's dashboard: the cluster and its actors.

    Args:
        context: the browser.
        address: URL of the dashboard.
        out: folder of the screenshots.
    """
    for name in ("cluster", "actors"):
        take(context, f"{address.rstrip('/')}/#/{name}", out / f"ray-{name}.png")


def take(
    context: BrowserContext,
    url: str,
    path: Path,
    arrange: Callable[[Page], None] | None = None,
) -> None:
    """Open a page, arrange it, save a screenshot, and close the page.

    Args:
        context: the browser.
        url: address of the page.
        path: file of the screenshot.
        arrange: called with the page before the screenshot is taken; if it times out, a note is
            printed and the screenshot is taken anyway.
    """
    page = context.new_page()
    page.goto(url)
    with contextlib.suppress(PageTimeout):  # self-refreshing pages are never idle
        page.wait_for_load_state("networkidle", timeout=5_000)
    page.wait_for_timeout(2_500)  # charts are drawn after their data have loaded
    if arrange is not None:
        try:
            arrange(page)
        except PageTimeout:
            print(f"{path}: unexpected page layout, not arranged", file=sys.stderr)
        page.wait_for_timeout(1_000)
    save(page, path)
    page.close()


def _compare_validation(page: Page) -> None:
    """Replace the default metrics of the parallel coordinates with cost and validation metric."""
    page.set_default_timeout(5_000)
    box = page.get_by_role("combobox").nth(1)
    box.click()
    box.press("Backspace")
    for name in ("cost_bops", "validation"):
        box.fill(name)
        page.locator(f"[class*=select-item][title='{name}']").click()
    box.press("Escape")


def save(page: Page, path: Path, shoot: Callable[..., bytes] | None = None) -> None:
    """Save a screenshot of a page, or of a part of it, and print the size of the file.

    Args:
        page: the page.
        path: file of the screenshot.
        shoot: function that takes the screenshot; by default, that of the page.
    """
    size = len((shoot or page.screenshot)(path=path, animations="disabled"))
    note = "" if size <= LARGEST_BYTES else f" (more than {LARGEST_BYTES // 1000} kB)"
    print(f"{path}: {size // 1000} kB{note}")


def _local(url: str) -> bool:
    """Return whether a URL needs no access to another machine."""
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


def _mlflow_view(experiment: str, parents: list[str]) -> str:
    """Return a script that expands the parents, selects `COLUMNS` and hides the assistant.

    The keys are internal to MLflow; a version that uses different ones shows its default view.
    """
    view = {"selectedColumns": COLUMNS, "runsExpanded": dict.fromkeys(parents, True)}
    key = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState'
    items = {
        key: json.dumps(view),
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
        "mlflow.assistant.panelOpen_v1": "false",
    }
    return f"for (const [k, v] of Object.entries({json.dumps(items)})) localStorage.setItem(k, v);"


def _tags(run: dict[str, Any]) -> dict[str, str]:
    """Return the tags of an MLflow run by name."""
    return {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}


def _mlflow(address: str, call: str, query: dict[str, Any]) -> dict[str, Any]:
    """Call a method of MLflow's REST API and return its answer."""
    answer: dict[str, Any] = json.loads(_fetch(f"{address}/api/2.0/mlflow/{call}", query))
    return answer


def _fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    """Return the answer to a GET request or, with a body, to a POST request with that JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    sys.exit(main())
