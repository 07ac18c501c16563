"""The synthetic sweep of the tracking tests as input to the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

from made_up_sweep import complete, curve, failed, layers, running  # noqa: E402

from nipq_search.records import SweepRecord, TrialRecord  # noqa: E402
from nipq_search.report import ReportData  # noqa: E402
from nipq_search.tracking import curves_table, results_table  # noqa: E402

HOSTILE = "boom </script><script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>"
HYPERVOLUME = 0.8125


def front_document(records: list[TrialRecord]) -> dict[str, Any]:
    """Build the document of `front --json` for `records`."""
    points = [
        {
            "trial": record.trial,
            "on_front": record.on_front,
            "budget": dict(record.budget),
            "budget_label": record.budget_label,
            "cost": dict(record.cost),
            "validation": record.validation,
            "test": record.test,
            "samples": record.samples,
            "seconds": record.seconds,
            "parent": record.parent,
        }
        for record in records
        if record.state == "COMPLETE"
    ]
    baselines = [
        {"bits": bits, "validation": value, "test": None, "cost": {"bops": 1e6 * bits**2}}
        for bits, value in ((4, 0.87), (8, 0.905))
    ]
    return {
        "schema": 1,
        "metric": {"name": "accuracy", "mode": "max"},
        "bops_convention": 1,
        "front_cost": "bops",
        "hypervolume": HYPERVOLUME if points else None,
        "test_hypervolume": None,
        "total_samples": 123_456,
        "float": {"validation": 0.912, "test": None, "cost": {"bops": 1.02e9}},
        "baselines": baselines if points else [],
        "points": points,
    }


def report_data(records: list[TrialRecord], **changes: Any) -> ReportData:
    sweep = SweepRecord(
        name="digits",
        config={"seed": 0, "budgets": [{"bops": "uniform 4"}]},
        task="digits",
        dataset={"name": "digits", "digest": "ab"},
        metric="accuracy",
        mode="max",
        front=front_document(records),
    )
    done = [record.trial for record in records if record.state == "COMPLETE"]
    parts: dict[str, Any] = {
        "sweep": sweep,
        "results": results_table(records),
        "curves": curves_table({number: curve(number) for number in done}),
        "layers": {number: layers(number) for number in done},
    }
    return ReportData(**(parts | changes))


@pytest.fixture
def data() -> ReportData:
    """Five finished trials with three budgets, a failed trial and a running one."""
    records = [
        complete(0, bits=4, front=True),
        complete(1, bits=4),
        complete(2, bits=3, front=True),
        complete(3, bits=2.5, front=True),
        complete(4, bits=3),
        failed(5, HOSTILE),
        running(6),
    ]
    return report_data(records)


@pytest.fixture
def nothing() -> ReportData:
    """A sweep whose trials have all failed or are waiting."""
    records = [failed(0), TrialRecord(trial=1, state="WAITING")]
    return report_data(records)
