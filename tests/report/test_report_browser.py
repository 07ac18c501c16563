"""The report in a real browser, opened from a file without network access."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from nipq_search.report import ReportData, render

pytestmark = pytest.mark.browser

sys.path.insert(0, str(Path(__file__).parents[2] / "dashboards"))
from screenshots import ARGUMENTS  # noqa: E402

HEIGHTS = """() => document.getElementById("bits").data.map(trace => trace.y)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def faults() -> list[str]:
    """Collect the errors of the page and its network requests."""
    return []


@pytest.fixture
def page(browser: Browser, faults: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 1000})

    def refuse(route: object, request: object) -> None:
        faults.append(f"network: {request.url}")  # type: ignore[attr-defined]
        route.abort()  # type: ignore[attr-defined]

    context.route(lambda url: not url.startswith(("file:", "data:", "blob:")), refuse)
    page = context.new_page()
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    context.close()


def show(page: Page, data: ReportData, folder: Path) -> None:
    path = folder / "report.html"
    path.write_text(render(data.sweep, data.results, data.curves, data.layers, data.histories))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelector('#pareto .plot-container') !== null")


def click_trial(page: Page, trial: int) -> None:
    """Click the center of the point of `trial`, whose position Plotly reports."""
    spot = page.evaluate(
        """trial => {
          const box = document.getElementById("pareto");
          for (const trace of box.data) {
            const at = (trace.customdata || []).indexOf(trial);
            if (at < 0) continue;
            const layout = box._fullLayout, frame = box.getBoundingClientRect();
            return [frame.left + layout.xaxis._offset + layout.xaxis.d2p(trace.x[at]),
                    frame.top + layout.yaxis._offset + layout.yaxis.d2p(trace.y[at])];
          }
        }""",
        trial,
    )
    page.mouse.move(*spot)
    # Plotly applies a click to the last hovered point, which may still be the previous one.
    page.wait_for_function(
        """trial => {
          const hovered = document.getElementById("pareto")._hoverdata;
          return hovered && hovered.length > 0 && hovered[0].customdata === trial;
        }""",
        arg=trial,
    )
    page.mouse.click(*spot)


def test_a_click_on_a_point_shows_its_bits(
    page: Page, faults: list[str], data: ReportData, tmp_path: Path
) -> None:
    show(page, data, tmp_path)
    expected = {
        trial: [
            [layer[key] or 0 for layer in layers] for key in ("weight_bits", "activation_bits")
        ]
        for trial, layers in data.layers.items()
    }
    assert page.evaluate(HEIGHTS) == expected[0]
    for trial in (3, 1):
        click_trial(page, trial)
        assert page.evaluate(HEIGHTS) == expected[trial]
        assert page.text_content("#bits-caption").startswith(f"trial {trial} ")  # type: ignore[union-attr]
        chosen = page.locator("#trials tr.chosen")
        assert chosen.get_attribute("data-trial") == str(trial)
    page.select_option("#bits-trial", "2")
    assert page.evaluate(HEIGHTS) == expected[2]
    page.click("#trials tr[data-trial='6']")
    assert page.text_content("#bits-caption") == "Trial 6: no bits available."
    assert page.evaluate("window.hacked") is None
    assert "window.hacked = 1" in (page.text_content("#failures") or "")
    assert faults == []


def test_bits_over_time_follow_the_selected_trial(
    page: Page, faults: list[str], data: ReportData, tmp_path: Path
) -> None:
    notes = [
        {"step": step, "bits": {"<b>stem": 4.0, "head": 4.0 + step}, "gradient": {"head": -0.5}}
        for step in (0, 1, 2)
    ]
    show(page, dataclasses.replace(data, histories={3: notes}), tmp_path)
    lines = "document.getElementById('movement').data.map(line => line.y)"
    hint = "#movement-hint"
    assert page.evaluate(lines) == []
    assert page.text_content(hint) == "No trial with a noise phase is selected."
    page.select_option("#bits-trial", "3")
    assert page.evaluate(lines) == [[4, 4, 4], [4, 5, 6]]
    assert (page.text_content(hint) or "").startswith("1 of 2 bit-widths never moved: <b>stem.")
    page.select_option("#movement-value", "gradient")
    assert page.evaluate(lines)[1] == [-0.5] * 3
    page.select_option("#bits-trial", "1")
    assert page.evaluate(lines) == []
    assert faults == []


def test_a_click_on_a_heading_sorts(
    page: Page, faults: list[str], data: ReportData, tmp_path: Path
) -> None:
    show(page, data, tmp_path)
    page.click("#trials th:text-is('bops')")
    page.click("#trials th:text-is('bops')")
    first = page.locator("#trials tbody tr").first
    assert first.get_attribute("data-trial") in ("0", "1")
    assert faults == []


def test_a_page_without_finished_trials_has_no_errors(
    page: Page, faults: list[str], nothing: ReportData, tmp_path: Path
) -> None:
    show(page, nothing, tmp_path)
    assert page.locator("#failures").is_visible()
    assert faults == []
