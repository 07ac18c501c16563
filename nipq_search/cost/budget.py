"""Budgets, which are absolute targets by cost name, and the penalty that enforces them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from nipq_search.cost.base import cost_estimate, get_cost
from nipq_search.errors import UserError


class Budget:
    """One or more absolute cost targets, all of which must be met.

    Args:
        targets: target by cost name, in the unit of the cost.

    Raises:
        UserError: no target is given, a cost is unknown, or a target is not a positive, finite
            number.

    Example:
        >>> import nipq_search as ns
        >>> budget = ns.Budget(bops=5.3e9, weight_bytes=2e6)
        >>> budget
        Budget(bops=5.3e+09, weight_bytes=2e+06)
        >>> budget.targets["bops"]
        5300000000.0
    """

    targets: Mapping[str, float]

    def __init__(self, **targets: float) -> None:
        """Validate the targets."""
        if not targets:
            raise UserError("Budget: give at least one target, such as bops=5.3e9")
        for name, target in targets.items():
            get_cost(name)
            number = isinstance(target, (int, float)) and not isinstance(target, bool)
            if not number or not 0 < target < math.inf:
                raise UserError(f"Budget: {name}={target!r} is not a positive, finite number")
        object.__setattr__(self, "targets", MappingProxyType(dict(targets)))

    def __setattr__(self, name: str, value: object) -> None:
        """Reject changes: budgets are immutable."""
        raise AttributeError("a Budget is immutable; create a new one")

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the costs."""
        return iter(self.targets)

    def __eq__(self, other: object) -> bool:
        """Compare by targets."""
        return isinstance(other, Budget) and self.targets == other.targets

    def __hash__(self) -> int:
        """Return a hash of the targets, consistent with equality."""
        return hash(frozenset(self.targets.items()))

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle by way of the targets, from which the budget is created again."""
        return _rebuild, (dict(self.targets),)

    def __repr__(self) -> str:
        """Return the call that creates this budget, with targets rounded to six digits."""
        return f"Budget({', '.join(f'{n}={v:g}' for n, v in self.targets.items())})"


def _rebuild(targets: dict[str, float]) -> Budget:
    return Budget(**targets)


BETA = 1 / 5.3
"""Distance from ratio 1 at which the penalty becomes linear.

The paper uses a distance of 1 GBOPs at a target of 5.3 GBOPs.
"""


def cost_penalty(model: nn.Module, budget: Budget, beta: float = BETA) -> Tensor:
    """Return the two-sided smooth L1 penalty on cost / target at the soft bit-widths.

    Follows NIPQ, section 5, with costs replaced by ratios. With several targets, only the largest
    ratio counts. The penalty is two-sided because a one-sided penalty would leave part of the
    budget unused.

    Args:
        model: a prepared model.
        budget: the targets.
        beta: distance from ratio 1 up to which the penalty is quadratic.

    Returns:
        A scalar, differentiable in the bit-widths, to be scaled by the regularization strength.

    Raises:
        UserError: the model is not prepared.

    Example:
        >>> import nipq_search as ns
        >>> import torch
        >>> model = ns.prepare(torch.nn.Linear(4, 2), torch.randn(1, 4))
        >>> penalty = ns.cost_penalty(model, ns.Budget(bops=128))
        >>> (0.1 * penalty).backward()
    """
    ratios = [cost_estimate(name, model) / target for name, target in budget.targets.items()]
    ratio = torch.stack([r.reshape(()) for r in ratios]).amax()
    return nn.functional.smooth_l1_loss(ratio, torch.ones_like(ratio), beta=beta)
