"""Job outcomes, and the reports that carry them across a process boundary."""

from __future__ import annotations

import json

import pytest

from nipq_search.search.jobs import JobOutcome, OutcomeKind


@pytest.mark.parametrize("kind", OutcomeKind)
def test_an_outcome_survives_its_report(kind):
    outcome = JobOutcome(kind=kind, reason="the disk is full")
    assert JobOutcome.from_report(json.loads(json.dumps(outcome.as_report()))) == outcome


@pytest.mark.parametrize("report", [None, {}, {"epoch": 3, "job": "trial-003"}])
def test_a_report_without_an_outcome_has_none(report):
    assert JobOutcome.from_report(report) is None


def test_only_complete_and_failed_jobs_have_a_record():
    have_record = {kind for kind in OutcomeKind if JobOutcome(kind=kind).has_record}
    assert have_record == {OutcomeKind.COMPLETE, OutcomeKind.FAIL}
