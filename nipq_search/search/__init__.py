"""The search: which trials to train under which budgets, on which machines.

Start reading in `run.py`, the driver of a sweep. Folders, from the bottom to the top: `jobs`
(jobs on disk) and `strategies` (what to try), `config` and `study`, then `worker`, `coordinator`
and `results`, then `backend` (Ray), `checks`, `commands`. The only place that imports ray, optuna
and pydantic.
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
    """This package, which can be called.

    `nipq_search.search` is both a package and a public function. Python binds the package to the
    name on import, so a function of that name would come and go with the order of imports.
    """

    def __call__(
        self,
        config: SweepConfig | Mapping[str, Any] | Path | str,
        out: Path | str | None = None,
        **options: Any,
    ) -> Sweep:
        """Run a sweep; see `nipq_search.search.run.search`."""
        from nipq_search.search.run import search

        return search(config, out, **options)


sys.modules[__name__].__class__ = _Search
