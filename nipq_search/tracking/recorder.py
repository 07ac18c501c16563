"""Recording of a sweep in MLflow; idempotent, so repeating it does not create duplicate runs.

All sweeps on a server share the experiment `nipq_search`, because MLflow's table and charts
compare runs within one experiment. Each sweep has a parent run, which has the sweep's name. Each
of its trials has a nested child run, named after the trial's number and budget.

Runs are identified by their tags instead of by a local file of run IDs:

    nipq.sweep_id   on the parent: the sweep's identity; see `MlflowRecorder`
    nipq.trial      on a child: the trial's number, unique among the children of a parent
    nipq.digest     on a child: digest of the recorded trial, sent last
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
from nipq_search.tracking import run_view, server
from nipq_search.tracking.runs import CachedRun, find_runs

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("nipq_search")

REJECTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow error codes for values that it rejects on every attempt."""
MAX_RETRY_SECONDS = 300.0
"""Longest pause after a failure, in seconds."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """The intended content of a child run."""

    trial: TrialRecord
    curve: tuple[CurvePoint, ...]
    layers: tuple[Mapping[str, Any], ...] | None

    def digest(self) -> str:
        """Return a digest of the record, without `on_front`, and of the learning curve."""
        # Whether a trial is on the front depends on other trials, so a separate tag stores it.
        record = asdict(self.trial)
        del record["on_front"]
        return run_view.fingerprint(record, [asdict(point) for point in self.curve])


@dataclass(frozen=True, kw_only=True)
class _Server:
    """An open connection, and the sweep's runs on the server.

    Attributes:
        client: the MLflow client.
        experiment: ID of the experiment.
        parent: the sweep's run.
        children: the trials' runs by trial number.
        front: trials whose runs are tagged `on_front`.
    """

    client: MlflowClient
    experiment: str
    parent: CachedRun
    children: dict[int, CachedRun]
    front: set[int]


class MlflowRecorder:
    """Keeps MLflow up to date with a sweep; failures to do so are logged, not raised.

    Only the first of several consecutive failures is logged. Unsent data are kept and sent by a
    later call, at the latest by `finish`, or by the recorder of a later run of the sweep. The
    class is not thread-safe; only the sweep's driver may use it.
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
        """Store the arguments; the connection is opened by `begin`.

        Args:
            out: the sweep's folder.
            sweep: the sweep's name.
            uri: URI of the server; None selects the one that `tracking_uri` returns.
            identity: distinguishes this sweep from others of the same name on the same server;
                not needed for a database in `out`.
            retry_seconds: initial pause in seconds after a failure; the pause is doubled after
                each further failure, up to 5 minutes.
        """
        self._out = out.absolute()
        self._sweep = sweep
        self._uri = server.tracking_uri(self._out, uri)
        self._identity = identity
        self._first_pause = self._pause = retry_seconds
        self._retry_at = 0.0
        self._unavailable = False
        self._begun: tuple[Mapping[str, Any], Mapping[str, str], Mapping[str, Any]] | None = None
        self._ended: str | None = None
        self._server: _Server | None = None
        self._wanted: dict[int, _Wanted] = {}
        self._unsent: set[int] = set()
        self._front: set[int] | None = None

    @property
    def address(self) -> str:
        """The server's URI without credentials."""
        return re.sub(r"//[^/@]*@", "//", self._uri)

    @property
    def behind(self) -> bool:
        """Whether the last attempt to send data failed, or unsent data about trials remain."""
        return self._unavailable or bool(self._unsent)

    def begin(
        self, config: Mapping[str, Any], tags: Mapping[str, str], dataset: Mapping[str, Any]
    ) -> None:
        """Find or create the sweep's run, set it to RUNNING, and read the trials' runs.

        Args:
            config: the resolved configuration, logged as flat params. Params are immutable in
                MLflow, so values that were changed for a resume are stored in tags `now.<key>`.
            tags: additional tags, which override the default context tags.
            dataset: `name`, `digest` and other properties of the data.
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
        """Record the current state of a trial.

        Only differences are sent, so repeated calls are cheap. Metrics of an epoch that the server
        already stores are not replaced.

        Args:
            trial: the trial's record.
            curve: the trial's learning curve, with one point per epoch so far.
            layers: one mapping per layer, in the format of `show --json`; stored as the artifact
                `bits.json`. None keeps the layers of an earlier call.
        """
        known = self._wanted.get(trial.trial)
        kept = tuple(layers) if layers is not None else (known.layers if known else None)
        self._wanted[trial.trial] = _Wanted(trial=trial, curve=tuple(curve), layers=kept)
        self._unsent.add(trial.trial)
        self._attempt()

    def update_front(self, numbers: Collection[int]) -> None:
        """Set the tag `on_front` of the trials' runs; this overrides the records' `on_front`.

        Args:
            numbers: numbers of the trials on the front.
        """
        self._front = set(numbers)
        self._attempt()

    def finish(
        self,
        status: str,
        artifacts: Sequence[Path] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """End the sweep's run and all trials' runs; store files and summary metrics.

        Args:
            status: MLflow status: `FINISHED`, `FAILED` or `KILLED`.
            artifacts: files to store in the sweep's run under their own names.
            metrics: metrics of the whole sweep, such as `hypervolume`.
        """
        self._ended = status
        self._attempt(force=True)
        if self._server is not None:
            self._guard(lambda found: self._close(found, status, artifacts, metrics or {}))

    def _attempt(self, force: bool = False) -> None:
        """Send all unsent data, unless the pause after a failure is not over yet.

        If `force` is set, do not wait for the end of the pause.
        """
        if self._begun is None or (not force and time.monotonic() < self._retry_at):
            return
        self._guard(self._send_all)

    def _guard(self, action: Any) -> None:
        """Connect if necessary and call `action`; on failure, warn and drop the connection.

        The next call reconnects and reads the server's state again, so data that were sent by an
        incomplete call are not duplicated.
        """
        try:
            if self._server is None:
                self._server = self._connect()
            action(self._server)
        except Exception as error:
            self._server = None
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, MAX_RETRY_SECONDS)
            if not self._unavailable:
                fix = ""
                if self._uri == server.local_uri(self._out):
                    fix = "; if this persists, remove mlflow.db and run the same command again"
                log.warning(
                    "MLflow is not up to date, but no data are lost: %s%s", _line(error), fix
                )
            self._unavailable = True
        else:
            if self._unavailable:
                log.info("MLflow is up to date again")
            self._unavailable, self._retry_at, self._pause = False, 0.0, self._first_pause

    def _connect(self) -> _Server:
        """Connect to the server, find or create the sweep's run, and read the trials' runs."""
        assert self._begun is not None
        config, tags, dataset = self._begun
        client = server.open_client(self._uri)
        experiment = server.experiment_id(client, self._uri, self._out)
        # Use a digest, because a name may contain quotes, which MLflow's filters cannot escape.
        identity = run_view.fingerprint(self._sweep, self._identity)
        tags = {**server.context_tags(), **{k: str(v) for k, v in tags.items()}}
        tags |= {"nipq.sweep": self._sweep, "nipq.sweep_id": identity}
        tags = {key: value[: run_view.TAG_LIMIT] for key, value in tags.items()}
        found = find_runs(client, experiment, "nipq.sweep_id", identity)
        if found:
            parent = found[0]
        else:
            run = client.create_run(experiment, tags=tags, run_name=self._sweep)
            parent = CachedRun(client, run)
        params = run_view.flatten(config)
        changed = {k: v for k, v in params.items() if parent.params.get(k, v) != v}
        # Also update values that were changed for one resume and reverted for a later one.
        changed |= {k: v for k, v in params.items() if f"now.{k}" in parent.tags}
        parent.send(params=params, tags=tags | {f"now.{k}": v for k, v in changed.items()})
        inputs = parent.run.inputs
        if dataset and not (inputs and inputs.dataset_inputs):
            client.log_inputs(parent.run_id, datasets=[server.dataset_input(dataset)])
        if self._ended is None:
            parent.set_status("RUNNING")
        children: dict[int, CachedRun] = {}
        for child in find_runs(client, experiment, "mlflow.parentRunId", parent.run_id):
            children.setdefault(int(child.tags.get("nipq.trial", -1)), child)
        front = {n for n, child in children.items() if child.tags.get("on_front") == "true"}
        return _Server(
            client=client, experiment=experiment, parent=parent, children=children, front=front
        )

    def _send_all(self, found: _Server) -> None:
        """Send every unsent trial, and the changed tags `on_front`."""
        for number in sorted(self._unsent):
            try:
                self._send_trial(found, self._wanted[number])
            except Exception as error:
                if getattr(error, "error_code", None) not in REJECTED:
                    raise
                log.warning("MLflow rejects a value of trial %d: %s", number, _line(error))
            self._unsent.discard(number)
        # Update only the tags that differ: updating all of them would take longer with each trial.
        wanted = found.front if self._front is None else self._front
        for number in sorted((wanted ^ found.front) & found.children.keys()):
            found.children[number].send(tags={"on_front": str(number in wanted).lower()})
            found.front.symmetric_difference_update({number})

    def _send_trial(self, found: _Server, wanted: _Wanted) -> None:
        """Bring the run of one trial up to date, creating it if necessary."""
        trial = wanted.trial
        child = found.children.get(trial.trial)
        if trial.state not in run_view.STATUS:  # a waiting trial has no run
            return
        status, digest = run_view.STATUS[trial.state], ""
        if status == "RUNNING":
            status = "RUNNING" if self._ended is None else "KILLED"
        else:
            digest = wanted.digest()
        tags = self._fixed_tags() | run_view.trial_tags(trial)
        on_front = self._is_on_front(trial)
        tags["on_front"] = str(on_front).lower()
        if child is None:
            child = CachedRun(
                found.client,
                found.client.create_run(
                    found.experiment,
                    start_time=_milliseconds(trial.started),
                    tags=server.context_tags()
                    | tags
                    | {"mlflow.parentRunId": found.parent.run_id},
                    run_name=run_view.run_name(trial),
                ),
            )
            found.children[trial.trial] = child
        child.set_status(status, _milliseconds(trial.ended))
        if wanted.layers is not None:
            self._store_layers(found, child, wanted.layers)
        if digest and child.tags.get("nipq.digest") == digest:
            child.send(tags=tags)
        else:
            rows = run_view.trial_rows(trial, wanted.curve)
            if digest:
                tags["nipq.digest"] = digest
            child.send(params=run_view.trial_params(trial), tags=tags, rows=rows)
        (found.front.add if on_front else found.front.discard)(trial.trial)

    def _fixed_tags(self) -> dict[str, str]:
        """Return tags with values from the configuration, for trials that do not set their own."""
        train = self._begun[0].get("train") if self._begun else None
        strength = train.get("lambda") if isinstance(train, Mapping) else None
        return {} if strength is None else {"lambda": run_view.value_text(strength)}

    def _store_layers(
        self, found: _Server, child: CachedRun, layers: Sequence[Mapping[str, Any]]
    ) -> None:
        """Store `layers` as the artifact `bits.json`, unless the run already contains them."""
        digest = run_view.fingerprint(layers)
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
        """End the trials' runs, store the files and the metrics, and end the sweep's run last."""
        now = _milliseconds(None)
        for child in found.children.values():
            if child.status == "RUNNING":
                child.set_status("KILLED", now)
        for path in artifacts:
            if path.is_file():
                data = path.read_bytes()
                server.store_artifact(found.client, self._uri, found.parent.run, path.name, data)
        # Each run of the driver logs the metrics at a new step, unless none of them has changed.
        keys = {run_view.clean_key(key): float(value) for key, value in metrics.items()}
        if any(found.parent.metrics.get(key) != value for key, value in keys.items()):
            step = int(found.parent.tags.get("nipq.ends", "0"))
            rows = [
                run_view.Row(key=key, step=step, timestamp=now, value=value)
                for key, value in keys.items()
            ]
            found.parent.send(rows=rows, tags={"nipq.ends": str(step + 1)})
            found.parent.metrics |= keys
        found.parent.set_status(status, now)

    def _is_on_front(self, trial: TrialRecord) -> bool:
        """Return whether a trial is on the front.

        Once `update_front` has been called, its argument overrides the trials' records.
        """
        return trial.on_front if self._front is None else trial.trial in self._front


def _milliseconds(seconds: float | None) -> int:
    """Convert Unix time from seconds to milliseconds; None stands for the current time."""
    return run_view.milliseconds(time.time() if seconds is None else seconds)


def _line(error: BaseException) -> str:
    """Format an error on one line, without the credentials that an address may contain."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"//[^/@\s]*@", "//***@", text.splitlines()[0])[:300]
