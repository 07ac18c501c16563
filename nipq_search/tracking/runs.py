"""Incremental updates of MLflow runs: only differences from the local copy of a run are sent."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from nipq_search.tracking.run_view import Row, chunks

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH = 800
"""Maximum number of metrics per batch. With 100 params and 100 tags, a batch then has the 1,000
entries that MLflow accepts."""
TEXTS_PER_BATCH = 100
"""Maximum number of params per batch, and of tags per batch, which is MLflow's limit for each."""


class CachedRun:
    """A run on the server, with a local copy of its params, tags, status and metrics.

    Args:
        client: the MLflow client.
        run: the run, as just found or created.

    Attributes:
        run: the run, as found or created; later updates do not change it.
        run_id: the run's ID.
        status: the run's last known status.
        params: the run's last known params.
        tags: the run's last known tags.
        metrics: the latest value of each metric, by key; `send` does not update it.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        """Copy the state of `run`."""
        self._client = client
        self.run = run
        self.run_id: str = run.info.run_id
        self.status: str = run.info.status
        self.tags: dict[str, str] = dict(run.data.tags)
        self.params: dict[str, str] = dict(run.data.params)
        self.metrics: dict[str, float] = dict(run.data.metrics)
        self._rows: set[tuple[str, int]] = set()
        self._unread = set(self.metrics)

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows whose (key, step) the run does not contain yet.

        MLflow's search returns only the latest value of each key. The full history of an existing
        key is therefore read once, before the first write to that key.
        """
        rows = list(rows)
        for key in self._unread & {row.key for row in rows}:
            history = self._client.get_metric_history(self.run_id, key)
            self._rows |= {(key, metric.step) for metric in history}
            self._unread.discard(key)
        return [row for row in rows if (row.key, row.step) not in self._rows]

    def send(
        self,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        rows: Iterable[Row] = (),
    ) -> None:
        """Send the entries that the run does not contain yet; the last batch has the last tags.

        Params are immutable in MLflow, so existing ones are skipped.

        Args:
            params: values of params, by key.
            tags: values of tags, by key.
            rows: metric values.
        """
        from mlflow.entities import Metric, Param, RunTag

        new_rows = self.missing(rows)
        new_params = {k: v for k, v in (params or {}).items() if k not in self.params}
        new_tags = {k: v for k, v in (tags or {}).items() if self.tags.get(k) != v}
        metric_parts = list(chunks(new_rows, METRICS_PER_BATCH))
        param_parts = list(chunks(list(new_params.items()), TEXTS_PER_BATCH))
        tag_parts = list(chunks(list(new_tags.items()), TEXTS_PER_BATCH))
        count = max(len(metric_parts), len(param_parts), len(tag_parts))
        # Align the parts at the end, so that the last batch contains the last tags.
        for number in range(-count, 0):
            batch_rows = metric_parts[number] if -number <= len(metric_parts) else ()
            batch_params = param_parts[number] if -number <= len(param_parts) else ()
            batch_tags = tag_parts[number] if -number <= len(tag_parts) else ()
            self._client.log_batch(
                self.run_id,
                metrics=[Metric(r.key, r.value, r.timestamp, r.step) for r in batch_rows],
                params=[Param(key, value) for key, value in batch_params],
                tags=[RunTag(key, value) for key, value in batch_tags],
            )
            self._rows |= {(row.key, row.step) for row in batch_rows}
            self.params |= dict(batch_params)
            self.tags |= dict(batch_tags)

    def set_status(self, status: str, ended: int | None = None) -> None:
        """Set the status if it has changed.

        Args:
            status: the new status.
            ended: Unix time of the end in milliseconds; None stands for the current time. It is
                ignored for the status RUNNING.
        """
        if status == self.status:
            return
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status=status, end_time=ended)
        self.status = status


def find_runs(client: MlflowClient, experiment: str, tag: str, value: str) -> list[CachedRun]:
    """Return the active runs with a given tag, oldest first.

    Args:
        client: the MLflow client.
        experiment: ID of the experiment.
        tag: key of the tag.
        value: value of the tag, without quotes, which MLflow's filter language cannot escape.

    Returns:
        The matching runs, with local copies of their state.
    """
    found: list[CachedRun] = []
    token: str | None = None
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            page = client.search_runs(
                [experiment],
                filter_string=f"tags.`{tag}` = '{value}'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
        found += [CachedRun(client, run) for run in page]
        token = page.token
        if not token:
            return found
