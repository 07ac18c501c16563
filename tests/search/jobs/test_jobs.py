"""The files of jobs, including torn and duplicate ones."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nipq_search import file_io
from nipq_search.records import CurvePoint
from nipq_search.search import jobs
from nipq_search.search.jobs import Job
from nipq_search.train.models import MODEL_FILE


def job_in(out, kind="trial", number=3, run="one"):
    return Job(kind=kind, number=number, out=str(out), config={}, run=run, seed=1)


def point(epoch, timestamp=0.0):
    return CurvePoint(
        epoch=epoch, step=10 * epoch, phase="noise", timestamp=timestamp, metrics={"loss": 1.0}
    )


def write_curve(attempt, points, torn=""):
    lines = [json.dumps(dataclasses.asdict(p)) + "\n" for p in points]
    (attempt / jobs.CURVE).write_text("".join(lines) + torn)


def test_names_and_folders(tmp_path):
    assert job_in(tmp_path).name == "trial-003"
    assert job_in(tmp_path).folder == tmp_path / "trials" / "3"
    assert job_in(tmp_path, "baseline", 4).name == "lsq-4"
    assert job_in(tmp_path, "baseline", 4).folder == tmp_path / "baselines" / "lsq-4"
    assert job_in(tmp_path, "float", 0).folder == tmp_path / "float"
    assert Job(**job_in(tmp_path).as_json()) == job_in(tmp_path)


def test_attempts_are_numbered_past_nine(tmp_path):
    job = job_in(tmp_path)
    opened = [jobs.open_attempt(job) for _ in range(11)]
    assert [path.name for path in jobs.attempts(job.folder)] == [
        f"attempt-{number}" for number in range(1, 12)
    ]
    assert jobs.attempts(job.folder) == opened
    started = file_io.read_json(opened[0] / jobs.STARTED)
    assert started.keys() == {"pid", "host", "node", "run", "time"} and started["run"] == "one"


def test_a_lost_attempt_folder_is_not_taken_twice(tmp_path):
    job = job_in(tmp_path)
    (job.folder / "attempt-2").mkdir(parents=True)
    assert jobs.open_attempt(job).name == "attempt-3"


def test_only_complete_records_count(tmp_path):
    job = job_in(tmp_path)
    first, second = jobs.open_attempt(job), jobs.open_attempt(job)
    assert jobs.committed_record(job.folder) is None
    (second / jobs.RESULT).write_text('{"state": "COMPLETE"')
    assert jobs.committed_record(job.folder) is None
    third = jobs.open_attempt(job)
    assert jobs.commit(third, {"state": "COMPLETE", "metrics": {"accuracy": 0.5}})
    assert jobs.committed_record(job.folder)["metrics"] == {"accuracy": 0.5}
    assert jobs.model_file(job.folder) == third / MODEL_FILE
    assert not jobs.commit(first, {"state": "FAIL"}) and not jobs.is_superseded(
        job.folder / "none"
    )
    assert jobs.committed_record(job.folder)["metrics"] == {"accuracy": 0.5}


@pytest.mark.parametrize("links", [True, False])
def test_an_attempt_ends_with_its_record_or_is_superseded(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    job = job_in(tmp_path)
    first = jobs.open_attempt(job)
    second = jobs.open_attempt(job)
    assert jobs.is_superseded(first) and not jobs.is_superseded(second)
    assert (
        not jobs.commit(first, {"state": "COMPLETE"}) and jobs.committed_record(job.folder) is None
    )
    assert jobs.commit(second, {"state": "COMPLETE"})
    with pytest.raises(jobs.AlreadyCommitted):
        jobs.open_attempt(job)
    assert jobs.attempts(job.folder) == [first, second]
    # The `test` job runs again whenever the front has changed.
    again = job_in(tmp_path, "test", 0)
    assert jobs.commit(jobs.open_attempt(again), {"state": "COMPLETE"})
    assert jobs.open_attempt(again).name == "attempt-2"


def without_links(*args):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_either_a_concurrent_commit_or_a_take_over_succeeds(tmp_path):
    """Either the attempt commits its record or the next attempt takes over, but never both."""
    with ThreadPoolExecutor(2) as pool:
        for number in range(100):
            job = job_in(tmp_path, number=number)
            attempt, gate = jobs.open_attempt(job), threading.Barrier(2)

            def commit(attempt=attempt, gate=gate):
                gate.wait()
                return jobs.commit(attempt, {"state": "COMPLETE"})

            def take_over(job=job, gate=gate):
                gate.wait()
                try:
                    return bool(jobs.open_attempt(job))
                except jobs.AlreadyCommitted:
                    return False

            done, taken = pool.submit(commit), pool.submit(take_over)
            assert done.result() != taken.result()
            assert (jobs.committed_record(job.folder) is not None) == done.result()
            assert len(jobs.attempts(job.folder)) == 1 + taken.result()


def test_models_without_the_committed_record_are_obsolete(tmp_path):
    job = job_in(tmp_path)
    opened = [jobs.open_attempt(job) for _ in range(3)]
    for attempt in opened:
        (attempt / MODEL_FILE).write_bytes(b"weights")
    assert jobs.model_files(job.folder, obsolete=True) == [], (
        "no record yet determines which one is current"
    )
    jobs.commit(opened[-1], {"state": "COMPLETE"})
    assert jobs.model_files(job.folder, obsolete=True) == [a / MODEL_FILE for a in opened[:2]]
    assert len(jobs.model_files(job.folder)) == 3


def test_the_first_record_of_a_rung_is_kept_unless_damaged(tmp_path):
    jobs.record_rung(tmp_path, 0, {"samples": 1})
    jobs.record_rung(tmp_path, 0, {"samples": 2})
    assert jobs.rung_records(tmp_path) == [{"samples": 1}]
    jobs.rung_file(tmp_path, 0).write_text("{")
    jobs.record_rung(tmp_path, 0, {"samples": 3})
    assert jobs.rung_records(tmp_path) == [{"samples": 3}]


def test_an_altered_record_is_ignored(tmp_path):
    job = job_in(tmp_path)
    attempt = jobs.open_attempt(job)
    jobs.commit(attempt, {"state": "COMPLETE", "metrics": {"accuracy": 0.5}})
    path = attempt / jobs.RESULT
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert jobs.committed_record(job.folder) is None


def test_crashes_hangs_and_stops_are_counted_separately(tmp_path):
    job = job_in(tmp_path)
    for marker in (None, None, jobs.STOPPED, jobs.HANG, jobs.RESULT):
        attempt = jobs.open_attempt(job)
        if marker is not None:
            (attempt / marker).write_text("{}")
    jobs.open_attempt(job_in(tmp_path, run="two"))
    assert len(jobs.crash_causes(job.folder, "one")) == 2
    assert len(jobs.crash_causes(job.folder, "two")) == 1
    assert jobs.count_hangs(job.folder) == 1
    assert (
        len(jobs.crash_causes(tmp_path / "none", "one"))
        == jobs.count_hangs(tmp_path / "none")
        == 0
    )


def test_an_empty_hang_marker_does_not_count_as_a_hang(tmp_path):
    attempt = jobs.open_attempt(job_in(tmp_path))
    (attempt / jobs.HANG).touch()
    assert jobs.count_hangs(attempt.parent) == 0
    assert len(jobs.crash_causes(attempt.parent, "one")) == 1


def test_the_live_attempt_is_the_last_one_of_this_run(tmp_path):
    job = job_in(tmp_path)
    assert jobs.live_start(job.folder, "one") is None
    jobs.open_attempt(job)
    last = jobs.open_attempt(job)
    assert jobs.live_start(job.folder, "one")["folder"] == str(last)
    assert jobs.live_start(job.folder, "two") is None
    (last / jobs.STOPPED).write_text("{}")
    assert jobs.live_start(job.folder, "one") is None


def test_the_curve_contains_each_epoch_once_and_skips_torn_lines(tmp_path):
    job = job_in(tmp_path)
    first, second = jobs.open_attempt(job), jobs.open_attempt(job)
    jobs.open_attempt(job)
    write_curve(first, [point(1), point(2)], torn='{"epoch": 3, "st')
    write_curve(second, [point(2, timestamp=9.0), point(3)], torn='{"epoch": 4}\n')
    found = jobs.curve(job.folder)
    assert [p.epoch for p in found] == [1, 2, 3]
    assert found[1].timestamp == 0.0, "the first measurement counts"


def test_samples_and_seconds_of_all_attempts_count(tmp_path):
    job = job_in(tmp_path)
    for samples in (100, 250):
        attempt = jobs.open_attempt(job)
        start = file_io.read_json(attempt / jobs.STARTED)["time"]
        progress = {"samples": samples, "epoch": 1, "time": start + 2}
        file_io.write_json(attempt / jobs.PROGRESS, progress)
    jobs.open_attempt(job)
    assert jobs.samples_processed(job.folder) == 350
    assert jobs.seconds_spent(job.folder) == pytest.approx(4)
    assert jobs.first_start(job.folder) <= start
    assert jobs.first_start(tmp_path / "none") is None
