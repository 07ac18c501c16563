"""The sweep in MLflow: a projection that can be repeated at any time and doubles nothing.

All sweeps of a server share one experiment, `nipq_search`, because MLflow's table and its charts
compare runs within an experiment: so two sweeps stand side by side without a detour. A sweep is a
parent run with the sweep's name; its trials are child runs, folded below it, named after the
trial's number and budget.

Runs are found again by their tags, never by a local file of run ids:

    nipq.sweep_id   on the parent: the sweep's identity, see `MlflowRecorder`
    nipq.trial      on a child: the trial's number, unique below one parent
    nipq.digest     on a child: digest of the record that it shows, sent last of all
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipq_search.records import CurvePoint, TrialRecord
from nipq_search.tracking import projection, server
from nipq_search.tracking.runs import RunMemory, find_runs

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("nipq_search")

REJECTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow's error codes for values that it will refuse however often they are sent."""
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What a child run ought to show."""

    trial: TrialRecord
    curve: tuple[CurvePoint, ...]
    layers: tuple[Mapping[str, Any], ...] | None

    def digest(self) -> str:
        """Digest of everything but `on_front` (other trials change it) and the layers."""
        record = asdict(self.trial)
        del record["on_front"]
        return projection.fingerprint(record, [asdict(point) for point in self.curve])


@dataclass(frozen=True, kw_only=True)
class _Server:
    """A live connection, and the sweep's runs as they were found there.

    `front` holds the trials whose runs are tagged as on the front.
    """

    client: MlflowClient
    experiment: str
    parent: RunMemory
    children: dict[int, RunMemory]
    front: set[int]


class MlflowRecorder:
    """Brings MLflow up to date with a sweep. No method ever raises into the search.

    Where the server is away there is one warning; what could not be sent is kept and sent with a
    later call, at the latest with `finish`, or by the recorder of a later run of the sweep.
    Meant for one thread of one process, the sweep's driver.
    """

    def __init__(
        self,
        out: Path,
        sweep: str,
        *,
        uri: str | None = None,
        identity: str | None = None,
        retry_seconds: float = 30.0,
    ) -> None:
        """Remember where to write; nothing is opened before `begin`.

        Args:
            out: the sweep's folder.
            sweep: the sweep's name.
            uri: the server; None for `MLFLOW_TRACKING_URI`, or else SQLite in `out`.
            identity: what tells this sweep from another of the same name on the same server; a
                database in `out` needs none.
            retry_seconds: pause after a failure, doubled with each further one up to 5 minutes.
        """
        self._out = out.absolute()
        self._sweep = sweep
        self._uri = server.tracking_uri(self._out, uri)
        self._identity = identity
        self._first_pause = self._pause = retry_seconds
        self._retry_at = 0.0
        self._away = False
        self._begun: tuple[Mapping[str, Any], Mapping[str, str], Mapping[str, Any]] | None = None
        self._ended: str | None = None
        self._server: _Server | None = None
        self._wanted: dict[int, _Wanted] = {}
        self._behind: set[int] = set()
        self._front: set[int] | None = None

    @property
    def address(self) -> str:
        """Where it writes, without user and password."""
        return re.sub(r"//[^/@]*@", "//", self._uri)

    @property
    def behind(self) -> bool:
        """Whether something given to this recorder has not reached the server yet."""
        return self._away or bool(self._behind)

    def begin(
        self, config: Mapping[str, Any], tags: Mapping[str, str], dataset: Mapping[str, Any]
    ) -> None:
        """Find or create the sweep's run, set it to RUNNING, and read the trials' runs.

        Args:
            config: the resolved configuration, logged as flat params. A param cannot change, so
                a value that a resume changed stands in the tag `now.<key>`.
            tags: further tags, before which the recorder's own give way.
            dataset: `name`, `digest` and anything else that describes the data.
        """
        self._begun = (config, tags, dataset)
        self._ended = None
        self._server = None
        self._attempt(force=True)

    def record(
        self,
        trial: TrialRecord,
        curve: Sequence[CurvePoint],
        layers: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Show `trial` as it is now, with all of its epochs so far.

        Cheap to repeat: only what the server lacks is sent. An epoch that is already there stays
        as it is. `layers` (one mapping per layer, as `show --json` has them) become the artifact
        `bits.json`.
        """
        known = self._wanted.get(trial.trial)
        kept = tuple(layers) if layers is not None else (known.layers if known else None)
        self._wanted[trial.trial] = _Wanted(trial=trial, curve=tuple(curve), layers=kept)
        self._behind.add(trial.trial)
        self._attempt()

    def update_front(self, numbers: Collection[int]) -> None:
        """Set the tag `on_front` of every trial; from then on it rules over the records' own."""
        self._front = set(numbers)
        self._attempt()

    def finish(
        self,
        status: str,
        artifacts: Sequence[Path] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """End the sweep's run, with its files and summary figures; no trial is left RUNNING.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
            artifacts: files to store with the sweep's run under their own names.
            metrics: figures of the sweep as a whole, such as `hypervolume`.
        """
        self._ended = status
        self._attempt(force=True)
        if self._server is not None:
            self._guard(lambda found: self._close(found, status, artifacts, metrics or {}))

    def _attempt(self, force: bool = False) -> None:
        """Bring the server up to date, unless it failed a moment ago."""
        if self._begun is None or (not force and time.monotonic() < self._retry_at):
            return
        self._guard(self._project_all)

    def _guard(self, action: Any) -> None:
        """Call `action` with the connection; a failure is a warning and forgets the connection.

        Forgetting is what keeps a half-done call from being doubled: the next one reads anew
        what the server holds.
        """
        try:
            if self._server is None:
                self._server = self._connect()
            action(self._server)
        except Exception as error:
            self._server = None
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            if not self._away:
                fix = ""
                if self._uri == server.own_uri(self._out):
                    fix = "; if it stays so, remove mlflow.db and the same command writes it again"
                log.warning("MLflow is not up to date, nothing is lost: %s%s", _line(error), fix)
            self._away = True
        else:
            if self._away:
                log.info("MLflow is up to date again")
            self._away, self._retry_at, self._pause = False, 0.0, self._first_pause

    def _connect(self) -> _Server:
        """Open the server and find, or create, the sweep's run; read the trials' runs."""
        assert self._begun is not None
        config, tags, dataset = self._begun
        client = server.open_client(self._uri)
        experiment = server.experiment_id(client, self._uri, self._out)
        # Text without quotes, for the server's filters.
        identity = projection.fingerprint(self._sweep, self._identity)
        tags = {**server.context_tags(), **{k: str(v) for k, v in tags.items()}}
        tags |= {"nipq.sweep": self._sweep, "nipq.sweep_id": identity}
        tags = {key: value[: projection.TAG_LIMIT] for key, value in tags.items()}
        found = find_runs(client, experiment, "nipq.sweep_id", identity)
        if found:
            parent = found[0]
        else:
            run = client.create_run(experiment, tags=tags, run_name=self._sweep)
            parent = RunMemory(client, run)
        params = projection.flatten(config)
        changed = {k: v for k, v in params.items() if parent.params.get(k, v) != v}
        # A value that a resume changed and a later one changed back must not stay wrong.
        changed |= {k: v for k, v in params.items() if f"now.{k}" in parent.tags}
        parent.send(params=params, tags=tags | {f"now.{k}": v for k, v in changed.items()})
        inputs = parent.run.inputs
        if dataset and not (inputs and inputs.dataset_inputs):
            client.log_inputs(parent.run_id, datasets=[server.dataset_input(dataset)])
        if self._ended is None:
            parent.set_status("RUNNING")
        children: dict[int, RunMemory] = {}
        for child in find_runs(client, experiment, "mlflow.parentRunId", parent.run_id):
            children.setdefault(int(child.tags.get("nipq.trial", -1)), child)
        front = {n for n, child in children.items() if child.tags.get("on_front") == "true"}
        return _Server(
            client=client, experiment=experiment, parent=parent, children=children, front=front
        )

    def _project_all(self, found: _Server) -> None:
        """Send every trial that is behind, and the tags of the front."""
        for number in sorted(self._behind):
            try:
                self._project(found, self._wanted[number])
            except Exception as error:
                if getattr(error, "error_code", None) not in REJECTED:
                    raise
                log.warning("MLflow refuses a value of trial %d: %s", number, _line(error))
            self._behind.discard(number)
        # Only where it differs: with thousands of trials, each new one would cost ever more.
        wanted = found.front if self._front is None else self._front
        for number in sorted((wanted ^ found.front) & found.children.keys()):
            found.children[number].send(tags={"on_front": str(number in wanted).lower()})
            found.front.symmetric_difference_update({number})

    def _project(self, found: _Server, wanted: _Wanted) -> None:
        """Bring one trial's run up to date."""
        trial = wanted.trial
        child = found.children.get(trial.trial)
        if trial.state not in projection.STATUS:  # it waits: nothing has happened yet
            return
        status, digest = projection.STATUS[trial.state], ""
        if status == "RUNNING":
            status = "RUNNING" if self._ended is None else "KILLED"
        else:
            digest = wanted.digest()
        tags = self._fixed_tags() | projection.trial_tags(trial)
        on_front = self._is_on_front(trial)
        tags["on_front"] = str(on_front).lower()
        if child is None:
            child = RunMemory(
                found.client,
                found.client.create_run(
                    found.experiment,
                    start_time=_milliseconds(trial.started),
                    tags=server.context_tags()
                    | tags
                    | {"mlflow.parentRunId": found.parent.run_id},
                    run_name=projection.run_name(trial),
                ),
            )
            found.children[trial.trial] = child
        child.set_status(status, _milliseconds(trial.ended))
        if wanted.layers is not None:
            self._store_layers(found, child, wanted.layers)
        if digest and child.tags.get("nipq.digest") == digest:
            child.send(tags=tags)
        else:
            rows = projection.trial_rows(trial, wanted.curve)
            if digest:
                tags["nipq.digest"] = digest
            child.send(params=projection.trial_params(trial), tags=tags, rows=rows)
        (found.front.add if on_front else found.front.discard)(trial.trial)

    def _fixed_tags(self) -> dict[str, str]:
        """Tags that the sweep's configuration gives where a trial searched nothing else."""
        train = self._begun[0].get("train") if self._begun else None
        strength = train.get("lambda") if isinstance(train, Mapping) else None
        return {} if strength is None else {"lambda": projection.value_text(strength)}

    def _store_layers(
        self, found: _Server, child: RunMemory, layers: Sequence[Mapping[str, Any]]
    ) -> None:
        """Store the bits by layer as `bits.json`, unless the run holds just these."""
        digest = projection.fingerprint(layers)
        if child.tags.get("nipq.bits") != digest:
            data = (json.dumps(layers, indent=1, default=str) + "\n").encode()
            server.store_artifact(found.client, self._uri, child.run, "bits.json", data)
            child.send(tags={"nipq.bits": digest})

    def _close(
        self,
        found: _Server,
        status: str,
        artifacts: Sequence[Path],
        metrics: Mapping[str, float],
    ) -> None:
        """End all runs: first what still runs, then the files, the sweep's own run last."""
        now = _milliseconds(None)
        for child in found.children.values():
            if child.status == "RUNNING":
                child.set_status("KILLED", now)
        for path in artifacts:
            if path.is_file():
                data = path.read_bytes()
                server.store_artifact(found.client, self._uri, found.parent.run, path.name, data)
        # Each end of the sweep is a step of its own, unless nothing has changed since the last.
        keys = {projection.clean_key(key): float(value) for key, value in metrics.items()}
        if any(found.parent.metrics.get(key) != value for key, value in keys.items()):
            step = int(found.parent.tags.get("nipq.ends", "0"))
            rows = [
                projection.Row(key=key, step=step, timestamp=now, value=value)
                for key, value in keys.items()
            ]
            found.parent.send(rows=rows, tags={"nipq.ends": str(step + 1)})
            found.parent.metrics |= keys
        found.parent.set_status(status, now)

    def _is_on_front(self, trial: TrialRecord) -> bool:
        """Whether a trial is on the front: the given one, else as its record says."""
        return trial.on_front if self._front is None else trial.trial in self._front


def _milliseconds(seconds: float | None) -> int:
    """Unix time in milliseconds; now, where it is not known."""
    return projection.milliseconds(time.time() if seconds is None else seconds)


def _line(error: BaseException) -> str:
    """An error as one line without the password that a server's address may contain."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"//[^/@\s]*@", "//***@", text.splitlines()[0])[:300]
