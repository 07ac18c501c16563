"""Sweeps whose models and checkpoints are stored in S3 or another file system."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from unit_helpers import Bench, digits, make_config, run_here

from nipq_search import file_io
from nipq_search.blobs import StoreUnavailable
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.checks.doctor import doctor
from nipq_search.search.commands.replay import replay
from nipq_search.search.jobs import Job, OutcomeKind, job_folder
from nipq_search.search.results.retention import collect
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.worker.train_spec import train_spec
from nipq_search.search.worker.worker import execute
from nipq_search.train import Hooks, Interrupted, train


def test_a_whole_sweep_in_s3(tmp_path, s3):
    """Warm starts, test metrics, `models/`, replay and gc work with no model in the folder."""
    config = make_config(checkpoints=s3.home, search__strategy="ladder", search__trials=4)
    out = tmp_path / "sweep"
    run_here(config, out)
    sweep = Sweep.open(out)
    records = sweep.trials()
    assert [r.state for r in records] == ["COMPLETE"] * 4 and any(r.test for r in records)
    assert not list(out.rglob("*.pt"))
    models = s3.objects()
    assert len(models) == len(list(out.rglob("model.pt.at"))), "no checkpoint is left"
    front = max(r.trial for r in records if r.on_front)
    assert isinstance(sweep.load_model(front), torch.nn.Module)
    assert replay(sweep, front)["equal"] and s3.objects() == models
    freed = collect(out)["freed"]
    assert len(s3.objects()) == len(models) - len(freed)
    texts = [p.read_bytes() for p in out.rglob("*") if p.is_file()]
    assert not any(b"a-secret-of-this-test" in text for text in texts)
    assert run_here(config, out).state == "finished"


def spec_of(bench, home):
    config = make_config(checkpoints=home, float__epochs=2)
    job = Job(kind="float", number=0, out=str(bench.out), config=config.as_json(), run="r", seed=5)
    return job, train_spec(config, job)


def interrupted(spec, folder):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(Interrupted):
        train(digits(), spec, folder, torch.device("cpu"), Hooks(should_stop=stop))


def in_one_go(spec, folder):
    """Return the result of training without interruption, with files in a local folder."""
    spec = dataclasses.replace(spec, home=None)
    return train(digits(), spec, folder / "whole", torch.device("cpu"))


def test_training_resumes_from_a_checkpoint_in_s3(tmp_path, s3):
    bench = Bench(tmp_path / "sweep", make_config())
    job, spec = spec_of(bench, s3.home)
    whole = in_one_go(spec, tmp_path)
    interrupted(spec, job.folder)
    assert any("/checkpoints/" in key for key in s3.objects())
    assert execute(job, digits(), lambda report: None).kind is OutcomeKind.COMPLETE
    record = jobs.committed_record(job.folder)
    assert record["model_sha256"] == whole.model_sha256
    assert not any("/checkpoints/" in key for key in s3.objects())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, s3):
    bench = Bench(tmp_path / "sweep", make_config())
    job, spec = spec_of(bench, s3.home)
    interrupted(spec, job.folder)
    for key in s3.objects():
        s3.put(key, b"torn")
    whole = in_one_go(spec, tmp_path)
    assert execute(job, digits(), lambda report: None).kind is OutcomeKind.COMPLETE
    assert jobs.committed_record(job.folder)["model_sha256"] == whole.model_sha256


def test_an_unreachable_store_fails_no_trial(tmp_path, s3):
    """The sweep ends with one line; the job is neither recorded nor restarted."""
    bench = Bench(tmp_path / "sweep", make_config())
    job, spec = spec_of(bench, s3.home)
    interrupted(spec, job.folder)
    s3.close()
    outcome = execute(job, digits(), lambda report: None)
    assert outcome.kind is OutcomeKind.HALT
    assert "some%20sweeps" in outcome.reason and "\n" not in outcome.reason
    assert jobs.committed_record(job.folder) is None
    with pytest.raises(StoreUnavailable):
        train(digits(), spec, job.folder, torch.device("cpu"))


def test_wrong_homes_are_refused_before_anything_starts(tmp_path, s3):
    with pytest.raises(UserError, match="checkpoints: leave keys out"):
        make_config(checkpoints="s3://key:word@bucket")
    config = make_config(checkpoints=s3.home.replace("models", "no-such-bucket"))
    with pytest.raises(UserError, match="checkpoints: s3://no-such-bucket.*keys in the environ"):
        run_here(config, tmp_path / "sweep")
    assert not job_folder(tmp_path / "sweep", "float", 0).exists()
    (check,) = [c for c in doctor(config) if c["check"] == "checkpoints"]
    assert not check["ok"] and "no-such-bucket" in check["fix"]
    (check,) = [c for c in doctor(make_config(checkpoints=s3.home)) if c["check"] == "checkpoints"]
    assert check["ok"], check


def test_sealed_pointers_are_the_only_ones(tmp_path, s3):
    """A modified pointer is ignored."""
    config = make_config(checkpoints=s3.home, search__trials=1, search__baselines=[])
    run_here(config, tmp_path / "sweep")
    pointer = tmp_path / "sweep/trials/0/attempt-1/model.pt.at"
    document = file_io.read_sealed(pointer)
    file_io.write_json(pointer, document | {"uri": "s3://elsewhere/x"})
    with pytest.raises(UserError, match="no trained model"):
        Sweep.open(tmp_path / "sweep").load_model(0)
