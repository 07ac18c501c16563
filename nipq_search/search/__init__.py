"""The search: selects the trials to train under each budget and runs them.

Start reading in `run.py`, the driver of a sweep. The subpackages, from the lowest layer to the
highest: `jobs` (jobs on disk) and `strategies` (trial selection); `config` and `study`; `worker`,
`coordinator` and `results`; `backend` (Ray); `checks`; `commands`. Apart from `testing`, only this
package imports ray, optuna and pydantic. Ray is imported in `backend`, and in a few functions of
`worker`, `checks` and `commands`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nipq_search.search.config.sweep_config import SweepConfig
    from nipq_search.search.results.sweep import Sweep


class _Search(ModuleType):
    """Callable module type for this package.

    `nipq_search.search` is both a package and a public function. Importing the package sets the
    attribute `search` of `nipq_search` to the package. If the function were a separate object, the
    import order would determine whether the attribute is the package or the function.
    """

    def __call__(
        self,
        config: SweepConfig | Mapping[str, Any] | Path | str,
        out: Path | str | None = None,
        **options: Any,
    ) -> Sweep:
        """Run a sweep from Python, as `nipq-search run` does.

        Args:
            config: a sweep configuration, an equivalent mapping, or the path of a sweep file.
            out: the sweep's folder; default `runs/<name>`.
            options: keyword arguments of `nipq_search.search.run.run_sweep`, such as `trials`.

        Returns:
            The sweep; its `front()` returns a pandas DataFrame.

        Raises:
            UserError: a check before the first job failed; the message names the key and the fix.
            RuntimeError: the sweep could not be completed; see `run_sweep` for the reasons.

        Example:
            A minimal sweep that runs in this process; by default, trials run on Ray.

            >>> import tempfile
            >>> import nipq_search
            >>> from nipq_search.search.backend.virtual import VirtualExecutor
            >>> config = {
            ...     "name": "demo",
            ...     "task": "digits",
            ...     "budgets": [{"bops": "uniform 4"}],
            ...     "float": {"epochs": 1},
            ...     "train": {"epochs": 1},
            ...     "search": {"trials": 1, "baselines": []},
            ... }
            >>> with tempfile.TemporaryDirectory() as out:
            ...     sweep = nipq_search.search(config, out, executor=VirtualExecutor())
            ...     front = sweep.front()
            >>> front["budget"].tolist()
            ['bops: uniform 4']
        """
        from nipq_search.search.run import search

        return search(config, out, **options)


sys.modules[__name__].__class__ = _Search
