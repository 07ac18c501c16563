"""One MLflow run and what it is known to hold, so that only differences are sent."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from nipq_search.tracking.projection import Row, chunks

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH = 800
"""MLflow takes 1,000 entries a batch, 100 of them params and 100 of them tags."""
TEXTS_PER_BATCH = 100


class RunMemory:
    """A run on the server together with a memory of its params, tags, status and metric rows.

    Attributes:
        run: the MLflow run as it was found or created.
        status: its status as last seen or set.
        tags: its tags as last seen or set.
        metrics: its latest value by metric key, as it was found.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        """Remember what `run`, fresh from a search or just created, holds."""
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
        """Those of `rows` whose (key, step) the run does not hold yet.

        A search tells only the latest value of a key, so the history of a key that a run was
        found with is read once, and only when there is something to write under that key.
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
        """Send what the run lacks of `params`, `tags` and `rows`, tags last; maybe nothing.

        Params cannot be changed in MLflow: those that are there already are left alone.
        """
        from mlflow.entities import Metric, Param, RunTag

        new_rows = self.missing(rows)
        new_params = {k: v for k, v in (params or {}).items() if k not in self.params}
        new_tags = {k: v for k, v in (tags or {}).items() if self.tags.get(k) != v}
        metric_parts = list(chunks(new_rows, METRICS_PER_BATCH))
        param_parts = list(chunks(list(new_params.items()), TEXTS_PER_BATCH))
        tag_parts = list(chunks(list(new_tags.items()), TEXTS_PER_BATCH))
        count = max(len(metric_parts), len(param_parts), len(tag_parts))
        # Aligned at the end, so that the batch with the last tags is the last of all.
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
        """Set the status unless it is set; `ended` in milliseconds, for any but RUNNING."""
        if status == self.status:
            return
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status=status, end_time=ended)
        self.status = status


def find_runs(client: MlflowClient, experiment: str, tag: str, value: str) -> list[RunMemory]:
    """Every active run of `experiment` whose `tag` equals `value`, oldest first.

    `value` must not contain quotes: MLflow's filter language cannot escape them.
    """
    found: list[RunMemory] = []
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
        found += [RunMemory(client, run) for run in page]
        token = page.token
        if not token:
            return found
