"""The content of a submitted job, and the checks before submission."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit_helpers import make_config

import nipq_search
from nipq_search.errors import UserError
from nipq_search.search.backend import code_shipping
from nipq_search.search.backend.code_shipping import sources
from nipq_search.search.commands import submit


@pytest.fixture(autouse=True)
def _no_token(monkeypatch, tmp_path):
    """Hide any Ray token of this machine; Ray reads its authentication mode once per process."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_the_command_is_quoted_for_a_shell():
    assert submit.run_command("a b", None, ["search.space.lr={log: [1, 2]}"], 7) == (
        "python -m nipq_search.cli run sweep.yaml --address auto "
        "--set 'search.space.lr={log: [1, 2]}' --trials 7 --out ~/runs/'a b'"
    )
    assert submit.run_command("x", "/mnt/o ut", [], None).endswith("--out '/mnt/o ut'")
    assert submit.run_command("x", "~/o ut/x", [], None).endswith("--out ~/'o ut'/x")


def test_shipped_code(tmp_path, monkeypatch):
    own = Path(nipq_search.__file__).parent
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lone_task.py").write_text("class T: ...\n")
    (tmp_path / "packed_task").mkdir()
    (tmp_path / "packed_task" / "__init__.py").touch()
    (tmp_path / "packed_task" / "inner.py").write_text("class T: ...\n")
    assert sources("digits") == [own]
    assert sources("nipq_search.tasks.vision.digits:Digits") == [own]
    assert sources("lone_task:T") == [own, tmp_path / "lone_task.py"]
    assert sources("packed_task.inner:T") == [own, tmp_path / "packed_task"]
    assert sources("not_there:T") == [own]


@pytest.mark.parametrize(
    ("address", "out", "fix"),
    [
        ("HEAD:8265", None, "http://HEAD:8265"),
        ("ray://HEAD:10001", None, "http://HEAD:8265"),
        ("http://127.0.0.1:9", "runs/x", "absolute folder"),
        ("http://127.0.0.1:9", None, "no Ray dashboard accepts jobs"),
    ],
)
def test_invalid_arguments_are_rejected(address, out, fix, tmp_path):
    (tmp_path / "sweep.yaml").write_text("{}")
    with pytest.raises(UserError, match=fix):
        submit.submit(tmp_path / "sweep.yaml", make_config(), address, out=out)


def test_a_missing_job_client_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "can_ship_code", lambda: False)
    with pytest.raises(UserError, match="ray\\[default\\]"):
        submit.submit(tmp_path / "sweep.yaml", make_config(), "http://127.0.0.1:9")
    assert code_shipping.can_ship_code()


def test_submission_is_retried_while_the_head_starts(monkeypatch):
    class Client:
        answers = [RuntimeError("No available agent, please try again later"), "job-1"]

        def submit_job(self, entrypoint):
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    assert submit._send(Client(), {"entrypoint": "x"}) == "job-1"
    Client.answers = [RuntimeError("entrypoint: refused")]
    with pytest.raises(RuntimeError, match="refused"):
        submit._send(Client(), {"entrypoint": "x"})
