"""SIGKILL of the driver before and after a trial's record: no work is lost or duplicated."""

from __future__ import annotations

import signal
from pathlib import Path

import pandas as pd
import pytest
from sweep_helpers import Command, Runs, attempts, ended, result, results, states, write_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("killing_driver.py")
TRIALS = 9


def test_sigkill_of_the_driver_at_every_boundary_loses_and_repeats_nothing(tmp_path: Path) -> None:
    write_sweep(tmp_path, search__trials=TRIALS)
    command, out = Command(tmp_path), tmp_path / "out"

    def killed(boundary: str, passage: int, executor: str = "virtual") -> dict[str, int]:
        process = command.popen(executor, boundary, str(passage), script=SCRIPT)
        with ended(process):
            _, stderr = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, stderr
        return results(out)

    def untold() -> list[int]:
        """Return the trials with a committed result that are still RUNNING in the study."""
        running = [n for n, state in enumerate(states(out)) if state == "RUNNING"]
        return [n for n in running if result(out, n) is not None]

    after_ask = killed("ask", 2)
    assert states(out) == ["RUNNING", "RUNNING"]
    assert not attempts(out, 1)

    after_record = killed("record", 1)
    assert after_ask.items() <= after_record.items()
    assert len(untold()) >= 1

    after_attributes = killed("attributes", 2)
    assert after_record.items() <= after_attributes.items()
    assert len(untold()) >= 1

    after_tell = killed("tell", 2, "tune")
    assert after_attributes.items() <= after_tell.items()
    assert states(out).count("COMPLETE") >= 3

    # Kill the driver after a launch, after a record in MLflow, and after a table is written.
    after_launch = killed("launch", 2)
    assert after_tell.items() <= after_launch.items()
    after_mlflow = killed("mlflow", len(states(out)))
    assert after_launch.items() <= after_mlflow.items()
    before_the_end = killed("parquet", 3)
    assert after_mlflow.items() <= before_the_end.items()
    pd.read_parquet(out / "results.parquet")

    command.run()
    assert states(out) == ["COMPLETE"] * TRIALS
    assert before_the_end.items() <= results(out).items()
    trial_results = [name for name in results(out) if name.startswith("trials/")]
    assert len(trial_results) == TRIALS
    for name in before_the_end:  # jobs that had a result were not restarted
        if name.startswith("trials/"):
            number = int(name.split("/")[1])
            assert str(attempts(out, number)[-1].relative_to(out)) == str(Path(name).parent)
    runs = Runs(out)
    assert runs.parent == "FINISHED"
    assert runs.children == dict.fromkeys(range(TRIALS), "FINISHED")
    command.no_orphans()


WORKER = '''
import os
import signal

from nipq_search import file_io
from nipq_search.tasks.vision.digits import Digits

write, write_once = file_io.write_bytes, file_io.write_once


class Doomed(Digits):
    """Digits whose worker dies once, right before or after it writes a certain file."""

    def __init__(self, *, file, mark, after):
        super().__init__(width=4)
        self.file, self.mark, self.after = file, mark, after

    def build_model(self):  # called in the worker, where tasks arrive already constructed
        def killing(write):
            def around(path, data):
                doomed = path.name == self.file and "trials" in path.parts
                doomed = doomed and not os.path.exists(self.mark)
                if doomed:
                    open(self.mark, "w").close()
                if doomed and not self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                written = write(path, data)
                if doomed:
                    os.kill(os.getpid(), signal.SIGKILL)
                return written

            return around

        file_io.write_bytes, file_io.write_once = killing(write), killing(write_once)
        return super().build_model()

'''


@pytest.mark.parametrize(
    ("file", "after"),
    [
        ("state.pt", True),
        ("manifest.json", False),
        ("manifest.json", True),
        ("model.pt", True),
        ("result.json", False),
        ("result.json", True),
    ],
)
def test_sigkill_of_a_worker_around_its_files(file: str, after: bool, tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(WORKER)
    arguments = {"file": file, "mark": str(tmp_path / "mark"), "after": after}
    write_sweep(
        tmp_path,
        task="my_module:Doomed",
        task_args=arguments,
        train__epochs=3,
        search__trials=1,
        resources__concurrent=1,
    )
    command, out = Command(tmp_path), tmp_path / "out"
    command("virtual", "none", "0", script=SCRIPT)
    assert (tmp_path / "mark").exists() and states(out) == ["COMPLETE"]
    tries = attempts(out, 0)
    assert len(tries) == (1 if (file, after) == ("result.json", True) else 2)
    assert result(out, 0) is not None
    command("replay", "out", "0")
