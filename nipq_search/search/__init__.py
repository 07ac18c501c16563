"""The search: budgets, ledger, executor. The only place that imports ray and optuna."""

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
