"""Budgets: absolute targets by cost name, the penalty that pulls towards them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from nipq_search.cost.base import cost_estimate, get_cost
from nipq_search.errors import UserError


class Budget:
    """Absolute targets; several hold together.

    Args:
        targets: cost name to target, for example `Budget(bops=5.3e9, weight_bytes=2e6)`.

    Raises:
        UserError: no target, an unknown cost, or a target that is not positive.
    """

    targets: Mapping[str, float]

    def __init__(self, **targets: float) -> None:
        """Check the targets."""
        if not targets:
            raise UserError("Budget: give at least one target, such as bops=5.3e9")
        for name, target in targets.items():
            get_cost(name)
            number = isinstance(target, (int, float)) and not isinstance(target, bool)
            if not number or not 0 < target < math.inf:
                raise UserError(f"Budget: {name}={target!r} is not a positive number")
        object.__setattr__(self, "targets", MappingProxyType(dict(targets)))

    def __setattr__(self, name: str, value: object) -> None:
        """Budgets do not change."""
        raise AttributeError("a Budget does not change; make a new one")

    def __iter__(self) -> Iterator[str]:
        """The names of the costs."""
        return iter(self.targets)

    def __eq__(self, other: object) -> bool:
        """Equal targets."""
        return isinstance(other, Budget) and self.targets == other.targets

    def __hash__(self) -> int:
        """Agrees with equality."""
        return hash(frozenset(self.targets.items()))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by targets."""
        return _rebuild, (dict(self.targets),)

    def __repr__(self) -> str:
        """As it is written."""
        return f"Budget({', '.join(f'{n}={v:g}' for n, v in self.targets.items())})"


def _rebuild(targets: dict[str, float]) -> Budget:
    return Budget(**targets)


BETA = 1 / 5.3
"""Width of the quadratic part of the penalty, on the ratio: the paper's 1 GBOPs at its target."""


def cost_penalty(model: nn.Module, budget: Budget, beta: float = BETA) -> Tensor:
    """Two-sided smooth L1 of cost / target at the soft bit-widths (NIPQ, section 5, on a ratio).

    Several targets count by the one that binds, the largest ratio. Two-sided, since a one-sided
    penalty leaves part of the budget unused.

    Returns:
        A scalar, differentiable in the bit-widths; multiply it by the regularization strength.
    """
    ratios = [cost_estimate(name, model) / target for name, target in budget.targets.items()]
    ratio = torch.stack([r.reshape(()) for r in ratios]).amax()
    return nn.functional.smooth_l1_loss(ratio, torch.ones_like(ratio), beta=beta)
