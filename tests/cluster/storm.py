"""Fault injection: processes, nodes, the driver and the servers are killed at seeded times.

Nothing is simulated: Ray runs on several nodes, with PostgreSQL and MLflow's server. The tests run
one storm; `benchmarks/storms.py` runs storms with many seeds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from postgres_server import Postgres
from sweep_helpers import BIN, Command, attempts, epochs, result, wait_for, write_sweep

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.tracking.tables import read_table

TRIALS, EPOCHS = 5, 40
ACTIONS = ("worker", "worker", "node", "driver", "driver and node", "tracking", "everything")
CALM_SECONDS = (2.0, 12.0)
TRACKING_PASSWORD = "an0ther-w0rd"
"""The server requires no password; the client sends one anyway."""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Tracking:
    """An MLflow server that can be killed and restarted."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        # The URL is passed in a variable, because all users can read command-line arguments.
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("NIPQ_", "MLFLOW_"))},
            "MLFLOW_BACKEND_STORE_URI": database.replace("postgresql:", "postgresql+psycopg:"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # would start additional processes
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Storm:
    """One sweep and the faults injected into it.

    Args:
        folder: a new folder.
        seed: seed of the faults and their times.
        cluster: a head without resources for trials.
        postgres: a running server.
        actions: number of faults.
    """

    def __init__(
        self, folder: Path, seed: int, cluster: Any, postgres: Postgres, actions: int = 5
    ) -> None:
        self.folder, self.random, self.cluster = folder, random.Random(seed), cluster
        self.postgres, self.actions = postgres, actions
        name = f"storm_{folder.name}_{seed}".replace("-", "_").lower()
        self.study_url = postgres.new_database(f"{name}_study")
        self.tracking = Tracking(folder, postgres.new_database(f"{name}_mlflow"))
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        write_sweep(
            folder,
            search__strategy="ladder",
            search__trials=TRIALS,
            train__epochs=EPOCHS,
            train__checkpoint_minutes=0.01,
            resources__concurrent=2,
            limits={"max_failures": 20},
        )
        (folder / "storage-url").write_text(self.study_url)
        (folder / "tmp").mkdir()
        url = {"NIPQ_STORAGE_URL": self.study_url}
        if seed % 2 == 0:
            url = {"NIPQ_STORAGE_URL_FILE": str(folder / "storage-url")}
        self.command = Command(
            folder,
            cold=True,
            **url,
            MLFLOW_TRACKING_URI=self.tracking.uri,
            MLFLOW_TRACKING_USERNAME="somebody",
            MLFLOW_TRACKING_PASSWORD=TRACKING_PASSWORD,
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
            TMPDIR=str(folder / "tmp"),
        )
        self.secrets = (postgres.password.encode(), TRACKING_PASSWORD.encode())
        self.seen: set[bytes] = set()
        self.out = self.command.out
        self.done: list[str] = []

    # Faults

    def run(self) -> None:
        """Run the sweep to its end while injecting faults."""
        wait_for(self.tracking.answers, "MLflow's server", 120)
        self._start()
        for _ in range(self.actions):
            self._calm(self.random.uniform(*CALM_SECONDS))
            if self.driver.poll() == 0:
                break
            action = self.random.choice(ACTIONS)
            self.done.append(action)
            getattr(self, f"_{action.replace(' ', '_')}")()
        limit = time.monotonic() + 300
        while self.driver.poll() is None:
            assert time.monotonic() < limit, f"the sweep hangs after {self.done}"
            self._calm(1)
        stdout, stderr = self.driver.communicate()
        assert self.driver.returncode == 0, f"{self.done}\n{stdout}\n{stderr}"
        if not self.tracking.answers():
            wait_for(self.tracking.answers, "MLflow's server", 120)
        self.command("sync", "out")

    def _start(self) -> None:
        arguments = self.command.arguments("--address", self.cluster.address)
        self.driver = self.command.popen(*arguments)

    def _calm(self, seconds: float) -> None:
        """Wait, and check that the results stay readable in the meantime."""
        for pid in self.command.processes():
            with contextlib.suppress(OSError):  # the process has ended
                self.seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.driver.poll() != 0:
            table = self.out / "results.parquet"
            if table.exists():
                read_table(table)
            time.sleep(0.2)
            if self.driver.poll() not in (None, 0, -signal.SIGKILL):
                stdout, stderr = self.driver.communicate()
                raise AssertionError(f"the driver ended after {self.done}\n{stdout}\n{stderr}")

    def _worker(self) -> None:
        """Kill a process that is training."""
        living = []
        for folder in sorted((self.out / "trials").glob("*")):
            last = jobs.attempts(folder)[-1:]
            if last and not any((last[0] / n).exists() for n in (jobs.RESULT, jobs.LOST)):
                living.append((file_io.read_json(last[0] / jobs.STARTED) or {}).get("pid"))
        for pid in [pid for pid in living if pid][:1]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _node(self) -> None:
        """Remove a node and add a new one."""
        victim = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.cluster.remove_node(victim, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def _driver(self) -> None:
        """Kill the driver, then run the same command again."""
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.communicate()
        self._start()

    def _driver_and_node(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.communicate()
        self._node()
        self._start()

    def _tracking(self) -> None:
        """Stop MLflow's server for a few seconds."""
        self.tracking.kill()
        self._calm(self.random.uniform(1, 5))
        self.tracking.start()

    def _everything(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.communicate()
        for _ in list(self.nodes):
            self._node()
        self.tracking.kill()
        self.tracking.start()
        self._start()

    # Checks

    def check(self, replays: int = 1) -> None:
        """Check that no trial is lost, duplicated or renumbered, and that no password leaks."""
        study = optuna.load_study(study_name="tiny", storage=self.study_url)
        trials = study.get_trials()
        study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
        assert [t.number for t in trials] == list(range(TRIALS))
        assert {t.state.name for t in trials} == {"COMPLETE"}, [t.user_attrs for t in trials]
        for trial in trials:
            record = result(self.out, trial.number)  # asserts that there is at most one
            assert record is not None and record["params"].items() <= trial.params.items()
            tries = attempts(self.out, trial.number)
            run = Counter(epoch for attempt in tries for epoch in epochs(attempt))
            assert set(run) == set(range(1, max(run) + 1)), "every epoch, starting with the first"
        table = pd.read_parquet(self.out / "results.parquet")
        assert list(table["trial"]) == list(range(TRIALS))
        assert set(table["state"]) == {"COMPLETE"}
        self._check_tracking({t.number: t.values[0] for t in trials})
        disturbed = [n for n in range(TRIALS) if len(attempts(self.out, n)) > 1]
        for number in disturbed[:replays]:
            self.command("replay", "out", str(number))
        best = subprocess.run(
            [BIN / "optuna", "best-trials", "--storage", self.study_url, "--study-name", "tiny"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert best.returncode == 0, best.stderr
        self._check_secrets()

    def _check_tracking(self, values: dict[int, float]) -> None:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.tracking.uri)
        (experiment,) = [e for e in client.search_experiments() if e.name == "nipq_search"]
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
        assert parent.info.status == "FINISHED"
        children = {int(r.data.tags["nipq.trial"]): r for r in runs if r is not parent}
        assert len(runs) == TRIALS + 1 and children.keys() == values.keys()
        for number, run in children.items():
            assert run.info.status == "FINISHED"
            assert run.data.metrics["validation"] == values[number]
            for key in ("train_loss", "validation_accuracy", "validation"):
                steps = [m.step for m in client.get_metric_history(run.info.run_id, key)]
                assert len(steps) == len(set(steps)), f"{key} of trial {number} was recorded twice"
        tags = " ".join(f"{k}={v}" for r in runs for k, v in r.data.tags.items())
        assert self.postgres.password not in tags

    def _check_secrets(self) -> None:
        """Check that no file of the sweep, Tune or Ray and no command line contains a password."""
        session = Path(self.cluster.head_node.get_session_dir_path())
        for place in (self.out, self.folder / "tmp", session):
            for file in place.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    data = file.read_bytes()
                    assert not any(word in data for word in self.secrets), f"{file} has a secret"
        assert any(b"nipq-search" in line for line in self.seen), (
            "no command line of the sweep was read"
        )
        assert not any(word in line for line in self.seen for word in self.secrets)

    def close(self) -> None:
        """Stop everything started here; the caller closes the cluster and the database server."""
        driver = getattr(self, "driver", None)
        ends: list[Callable[[], object]] = [self.tracking.kill]
        ends += [driver.kill] if driver is not None else []
        for node in self.nodes:
            ends.append(functools.partial(self.cluster.remove_node, node, allow_graceful=False))
        for end in ends:
            with contextlib.suppress(AttributeError, ProcessLookupError):
                end()
