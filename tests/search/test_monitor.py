"""The monitor of a running sweep: stop requests between two calls of `tick`."""

from __future__ import annotations

from unit_helpers import make_config

from nipq_search.search import jobs
from nipq_search.search.coordinator.coordinator import Verdict
from nipq_search.search.jobs.lease import request_stop
from nipq_search.search.run import RunEnd, run_sweep


class StopsBetweenTicks:
    """An executor whose first job ends because of a stop request, before the next `tick`."""

    def __init__(self, out):
        self.out = out

    def run(self, coordinator, task, tick):
        job = coordinator.next_job()
        jobs.open_attempt(job)
        assert request_stop(self.out) is not None
        coordinator.finished(job)
        self.next_job = coordinator.next_job()


def test_a_job_that_a_stop_request_ended_does_not_start_again(tmp_path):
    executor = StopsBetweenTicks(tmp_path / "sweep")
    end = run_sweep(make_config(), tmp_path / "sweep", executor=executor)
    assert executor.next_job is Verdict.DONE
    assert end.state is RunEnd.INTERRUPTED
