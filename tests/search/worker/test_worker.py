"""Real workers that train for a few steps: records, failures and the test split."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from unit_helpers import Bench, digits, make_config

from nipq_search import file_io
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.commands.replay import replay
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.coordinator.resolved import resolve_sweep
from nipq_search.search.jobs import TEST_FILE, Job, JobOutcome, OutcomeKind
from nipq_search.search.worker.worker import execute
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train import trial as training
from nipq_search.train.models import MODEL_FILE

ACCURACY = "accuracy"


class Spied(Digits):
    """A digits task that records the evaluated splits; may return `answer` or raise `error`."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self._splits = digits().splits()
        self.read: list[str] = []
        self.answer: dict[str, float] | None = None
        self.error: Exception | None = None

    def evaluate(self, model, split):
        self.read.append(split)
        if self.error is not None:
            raise self.error
        return super().evaluate(model, split) if self.answer is None else self.answer


@pytest.fixture
def task():
    return Spied()


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "sweep", make_config(search__trials=3))


def run(bench, task, until=None):
    """Run the sweep with real workers; return the coordinator and the splits read by each job."""
    seen: dict[str, list[str]] = {}

    def worker(job: Job) -> JobOutcome:
        task.read.clear()
        outcome = execute(job, task, lambda report: None)
        seen[job.name] = list(task.read)
        return outcome

    return bench.sweep(worker), seen


def test_a_whole_sweep_of_real_training_runs(bench, task):
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    coordinator, seen = run(bench, task)
    assert torch.equal(generator, torch.get_rng_state())
    trials = bench.ledger.trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    front = coordinator.front()
    for name, splits in seen.items():
        assert set(splits) == ({"test"} if name == "test" else {"validation"})
    assert len(seen["test"]) == 2 + len(front)
    for trial in trials:
        folder = bench.out / "trials" / str(trial.number)
        assert (folder / TEST_FILE).exists() == (trial.number in front)
        assert jobs.model_file(folder).exists() and not (folder / "checkpoints").exists()
        record = jobs.committed_record(folder)
        budget = bench.facts.budgets[trial.params["budget"]]
        assert trial.values[1] == record["cost"]["bops"] <= budget.targets["bops"]
        assert trial.user_attrs["budget_slack"] <= 0
        assert record["samples"] == jobs.samples_processed(folder) == 128 + 4 * 128 + 128
        assert [point.epoch for point in jobs.curve(folder)] == [1]
        attempt = jobs.attempts(folder)[0]
        assert {p.name for p in attempt.iterdir()} >= {jobs.RESULT, jobs.STARTED, jobs.LOG}
    layers = bench.view().show(0)["layers"]
    shown = {"name", "kind", "macs", "weight_bits", "activation_bits", "bops", "weight_bytes"}
    assert shown <= layers[0].keys()
    assert sum(row["bops"] for row in layers) == pytest.approx(trials[0].values[1], abs=1)
    lsq = jobs.committed_record(bench.out / "baselines" / "lsq-4")
    assert lsq["cost"]["mean_weight_bits"] == 4


def test_a_committed_job_is_not_trained_again(bench, task):
    coordinator = bench.open()
    job = coordinator.next_job()
    for _ in range(2):
        assert execute(job, task, lambda report: None).kind is OutcomeKind.COMPLETE
    assert len(jobs.attempts(job.folder)) == 1


def test_equal_sweeps_have_equal_models(tmp_path, task):
    shas = []
    for name in ("one", "two"):
        bench = Bench(tmp_path / name, make_config(search__trials=1, search__baselines=[]))
        run(bench, task)
        shas.append(jobs.committed_record(bench.out / "trials" / "0")["model_sha256"])
    assert shas[0] == shas[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_metric_fails_the_trial(value, bench, task):
    bench.sweep(lambda job: _float_first(bench, job, task, answer={ACCURACY: value, "loss": 1.0}))
    reasons = {t.user_attrs["reason"] for t in bench.ledger.trials()}
    assert reasons == {f"ValueError: the validation accuracy is {value}"}
    assert [t.state.name for t in bench.ledger.trials()] == ["FAIL"] * 3


def _float_first(bench, job, task, answer=None, error=None):
    """Run a job; the task misbehaves in all jobs except the float model and the test split."""
    task.answer, task.error = (None, None) if job.kind in ("float", "test") else (answer, error)
    return execute(job, task, lambda report: None)


def test_other_non_finite_metrics_are_omitted(bench, task):
    answer = {ACCURACY: 0.5, "loss": float("nan")}
    bench.sweep(lambda job: _float_first(bench, job, task, answer=answer))
    trials = bench.ledger.trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    assert "validation_loss" not in trials[0].user_attrs
    json.dumps(bench.view().front_document(), allow_nan=False)


def test_a_task_that_raises_fails_the_trial_with_its_traceback(bench, task):
    error = RuntimeError("the data\nare gone")
    bench.sweep(lambda job: _float_first(bench, job, task, error=error))
    trials = bench.ledger.trials()
    assert {t.user_attrs["reason"] for t in trials} == {"RuntimeError: the data are gone"}
    texts = {path.name: path.read_text() for path in bench.view().log_files(0)}
    assert "the data\nare gone" in texts[jobs.TRACEBACK]
    assert "are gone" not in texts.get(jobs.LOG, ""), "the error appears in one file only"
    assert trials[0].user_attrs["samples"] > 0, "samples of failed trials count"


def open_trial(bench, task):
    """Return the first trial of a sweep after training its float model."""
    coordinator: Coordinator = bench.open()
    while (job := coordinator.next_job()).kind != "trial":
        execute(job, task, lambda report: None)
        coordinator.finished(job)
    return job


def test_a_stop_request_saves_the_state_and_ends_the_attempt(bench, task):
    job = open_trial(bench, task)
    stop = bench.out / "stop.request"
    stop.touch()
    assert execute(job, task, lambda report: None).kind is OutcomeKind.STOPPED
    attempt = jobs.attempts(job.folder)[0]
    assert (attempt / jobs.STOPPED).exists() and jobs.committed_record(job.folder) is None
    assert (job.folder / "checkpoints").is_dir()
    stop.unlink()
    assert execute(job, task, lambda report: None).kind is OutcomeKind.COMPLETE
    record = jobs.committed_record(job.folder)
    assert record["attempts"] == 2 and len(jobs.crash_causes(job.folder, job.run)) == 0
    assert jobs.samples_processed(job.folder) == record["samples"], "no step was repeated"


@pytest.mark.parametrize("minutes", [3, None])
def test_a_job_that_hung_twice_is_given_up(minutes, bench, task):
    bench.config = make_config(limits={"trial_minutes": minutes})
    job = open_trial(bench, task)
    for _ in range(2):
        (jobs.open_attempt(job) / jobs.HANG).write_text("stack")
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL
    reason = jobs.committed_record(job.folder)["reason"]
    assert reason.startswith("hung: killed") and "limits.trial_minutes" in reason
    assert ("3 minutes" in reason) == (minutes is not None)


def test_a_job_whose_process_died_too_often_is_given_up(bench, task):
    job = open_trial(bench, task)
    for _ in range(3):
        jobs.open_attempt(job)
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL
    record = jobs.committed_record(job.folder)
    assert record["reason"] == "its process died 3 times (limits.max_failures)"
    assert record["attempts"] == 4


def test_a_float_model_from_a_file(tmp_path, task):
    torch.save(task.build_model().state_dict(), tmp_path / "float.pt")
    config = make_config(float={"checkpoint": str(tmp_path / "float.pt")}, search__trials=1)
    bench = Bench(tmp_path / "sweep", config)
    run(bench, task)
    record = jobs.committed_record(bench.out / "float")
    assert (record["samples"], record["steps"], record["state"]) == (0, 0, "COMPLETE")
    assert file_io.read_sealed(bench.out / "float" / TEST_FILE)["metrics"].keys() == {
        ACCURACY,
        "loss",
    }


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path, state: path.write_bytes(b"nothing"), "pt: not saved by torch.save"),
        (lambda path, state: path.mkdir(), "float.pt is a folder; name a file in it"),
        (lambda path, state: None, "float.pt: no such file"),
        (lambda path, state: torch.save({}, path), "entries are missing, such as stem"),
        (
            lambda path, state: torch.save({k: v[:1] for k, v in state.items() if v.ndim}, path),
            "are missing|size mismatch",
        ),
        (
            lambda path, state: torch.save({k: v + torch.nan for k, v in state.items()}, path),
            "weights are not finite: stem",
        ),
    ],
    ids=["text", "folder", "nothing", "empty", "shapes", "nan"],
)
def test_an_unusable_float_checkpoint_is_refused_before_the_start(tmp_path, task, write, problem):
    write(tmp_path / "float.pt", task.build_model().state_dict())
    config = make_config(float={"checkpoint": str(tmp_path / "float.pt")})
    for start in (lambda: resolve_sweep(config, task), Bench(tmp_path / "sweep", config).open):
        with pytest.raises(UserError, match=f"^float.checkpoint: .*{problem}") as error:
            start()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep" / "study.log").exists()


def test_a_full_disk_leaves_the_trial_open_and_ends_the_sweep(bench, task):
    job = open_trial(bench, task)
    task.error = OSError(errno.ENOSPC, "No space left on device")
    outcome = execute(job, task, lambda report: None)
    assert outcome.kind is OutcomeKind.HALT and "No space left on device" in outcome.reason
    coordinator = bench.open()
    coordinator.halt(outcome.reason)
    assert not isinstance(coordinator.next_job(), Job)
    task.error = None
    run(bench, task)
    assert [t.state.name for t in bench.ledger.trials()] == ["COMPLETE"] * 3


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_float_model_fails_no_trial(damage, bench, task):
    run(bench, task)
    file = jobs.model_file(bench.out / "float")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    bench.config = make_config(search__trials=4)
    coordinator, seen = run(bench, task)
    assert str(file) in coordinator.failure and "damaged" in coordinator.failure
    assert seen == {} and len(bench.ledger.trials()) == 3


def test_one_damaged_model_does_not_prevent_the_evaluation_of_others(bench, task):
    coordinator, _ = run(bench, task)
    for path in bench.out.rglob(TEST_FILE):
        path.unlink()
    broken = min(coordinator.front())
    jobs.model_file(bench.out / "trials" / str(broken)).write_bytes(b"garbage")
    run(bench, task)
    found = {path.parent.name for path in bench.out.rglob(TEST_FILE)}
    assert "float" in found and str(broken) not in found
    last = jobs.attempts(bench.out / "test")[-1]
    record = file_io.read_sealed(last / jobs.RESULT)
    assert record["state"] == "FAIL" and f"trial-{broken:03d}" in record["reason"]


def test_a_missing_metric_ends_the_sweep_at_the_float_model(bench, task):
    task.answer = {"acuracy": 0.5}
    coordinator, seen = run(bench, task)
    assert "no 'accuracy' (did you mean 'acuracy'?)" in coordinator.failure
    assert list(seen) == ["float"]


@pytest.mark.parametrize("place", ["evaluation", "model", "record"])
def test_a_superseded_attempt_changes_nothing(bench, task, monkeypatch, place):
    """The attempt's process was suspended near the end, and another attempt finished meanwhile."""
    coordinator = bench.open()
    job = coordinator.next_job()
    evaluate, write, write_once = task.evaluate, file_io.write_bytes, file_io.write_once
    after: list[dict[str, bytes]] = []

    def stopped(here):
        if here and not after:
            after.append({})
            with torch.enable_grad():  # as in a separate process
                assert execute(job, digits(), lambda report: None).kind is OutcomeKind.COMPLETE
            after[0] |= contents(job.folder / "attempt-2")

    def stopped_evaluate(model, split):
        stopped(place == "evaluation")
        return evaluate(model, split)

    def stopped_write(path, data):
        stopped(place == "model" and path.name == MODEL_FILE)
        return write(path, data)

    def stopped_write_once(path, data):
        stopped(place == "record" and path.name == jobs.RESULT)
        return write_once(path, data)

    monkeypatch.setattr(task, "evaluate", stopped_evaluate)
    monkeypatch.setattr(file_io, "write_bytes", stopped_write)
    monkeypatch.setattr(file_io, "write_once", stopped_write_once)
    monkeypatch.setattr(
        jobs, "is_superseded", lambda attempt: False
    )  # not noticed during training
    assert execute(job, task, lambda report: None).kind is OutcomeKind.SUPERSEDED
    first, second = jobs.attempts(job.folder)
    assert after == [contents(second)] and {jobs.RESULT, MODEL_FILE} <= after[0].keys()
    assert (first / jobs.STOPPED).exists() and not (first / MODEL_FILE).exists()
    record = jobs.committed_record(job.folder)
    assert record == file_io.read_sealed(second / jobs.RESULT) and record["attempts"] == 2
    model = jobs.model_file(job.folder)
    assert model.parent == second and file_io.digest(model.read_bytes()) == record["model_sha256"]
    assert execute(job, digits(), lambda report: None).kind is OutcomeKind.COMPLETE
    assert jobs.attempts(job.folder) == [first, second]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_unwritable_folder_fails_no_trial(bench, task, monkeypatch):
    job = open_trial(bench, task)

    def refused(job, node=None, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(job.folder / "attempt-1"))

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "open_attempt", refused)
        outcome = execute(job, task, lambda report: None)
    assert outcome.kind is OutcomeKind.HALT
    assert outcome.reason == (
        f"{job.folder}/attempt-1: Permission denied; fix this, then run the same command again to "
        "resume the sweep"
    )
    task.error = PermissionError(errno.EACCES, "Permission denied", "/somebody/elses")
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL, (
        "the file belongs to the task"
    )


class Killed(BaseException):
    """The process was killed."""


def interrupted(bench, task, **changes):
    """Return a trial that was killed after its first checkpoint, and change the configuration."""
    bench.config = make_config(train__epochs=3, search__trials=2, **changes.pop("first", {}))
    job = open_trial(bench, task)

    def killed(report):
        if report["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        execute(job, task, killed)
    assert any((job.folder / "checkpoints").iterdir())
    bench.config = make_config(train__epochs=3, search__trials=2, **changes)
    return job


@pytest.mark.parametrize("resources", [{"cpus": 2}, {"cpus": 1, "workers": 2}])
def test_a_resumed_trial_replays_even_if_resources_changed(bench, task, resources, warm):
    """It keeps the threads of its checkpoint, but starts over if the workers have changed."""
    job = interrupted(bench, task, resources=resources)
    run(bench, task)
    record, several = jobs.committed_record(job.folder), resources.get("workers", 1)
    assert (record["threads"], record["workers"], record["attempts"]) == (1, several, 2)
    epoch = 1_097  # training samples in an epoch
    repeated = jobs.samples_processed(job.folder) - record["samples"]
    assert epoch * several <= repeated < epoch * several + 150
    assert replay(bench.view(), job.number)["equal"]
    assert jobs.committed_record(bench.out / "trials/1")["threads"] == resources["cpus"]


def test_a_trial_whose_parent_is_gone_starts_over(bench, task):
    bench.config = make_config(search__strategy="fill", search__baselines=[])
    run_until_second(bench, task)
    child = bench.open().next_job()
    assert child.parent == 0
    jobs.open_attempt(child, threads=1, workers=1, parent=0)
    (child.folder / "checkpoints/000000001").mkdir(parents=True)
    jobs.model_file(bench.out / "trials/0").unlink()
    job = bench.open().next_job()
    assert (job.number, job.parent) == (1, None)
    assert execute(job, task, lambda report: None).kind is OutcomeKind.COMPLETE
    assert jobs.committed_record(job.folder)["parent"] is None
    assert replay(bench.view(), 1)["equal"]


def run_until_second(bench, task):
    """Train the float model and the first trial, and propose the second one."""
    coordinator = bench.open()
    while True:
        job = coordinator.next_job()
        if job.kind == "trial" and job.number == 1:
            return
        execute(job, task, lambda report: None)
        coordinator.finished(job)


def test_a_superseded_process_removes_its_late_checkpoints(bench, task, monkeypatch):
    """The process was suspended after the check in `before_write`, before its checkpoint."""
    job = interrupted(bench, task)
    save, late = training.save_checkpoint, []

    def stopped(folder, *arguments, **more):
        if not late:
            late.append(folder)
            with torch.enable_grad():
                assert execute(job, digits(), lambda report: None).kind is OutcomeKind.COMPLETE
        save(folder, *arguments, **more)

    monkeypatch.setattr(training, "save_checkpoint", stopped)
    assert execute(job, task, lambda report: None).kind in (
        OutcomeKind.STOPPED,
        OutcomeKind.SUPERSEDED,
    )
    assert late and not late[0].exists()


def test_giving_up_a_job_that_was_taken_over_returns_superseded(bench, task, monkeypatch):
    """Otherwise the driver would expect a record that does not exist."""
    job = open_trial(bench, task)
    for _ in range(3):
        jobs.open_attempt(job)
    commit = jobs.commit

    def late(attempt, record):
        jobs.open_attempt(job)
        return commit(attempt, record)

    monkeypatch.setattr(jobs, "commit", late)
    assert execute(job, task, lambda report: None).kind is OutcomeKind.SUPERSEDED
    assert jobs.committed_record(job.folder) is None
