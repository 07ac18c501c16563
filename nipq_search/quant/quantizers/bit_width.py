"""A bit-width that is learned, then frozen into an integer that no optimizer can reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.errors import UserError
from nipq_search.quant.numerics import widths

LEAST_BITS, MOST_BITS = 1, 16


def check_bits(bits: Sequence[int], what: str) -> tuple[int, ...]:
    """Return an allowed set in ascending order.

    Raises:
        UserError: it is empty, repeats a width, or leaves 1..16.
    """
    if not bits:
        raise UserError(f"{what}: no bit-width is allowed; give a list such as [2, 4, 8]")
    for width in bits:
        whole = isinstance(width, int) and not isinstance(width, bool)
        if not whole or not LEAST_BITS <= width <= MOST_BITS:
            raise UserError(f"{what}: {width!r} is no bit-width; use integers from 1 to 16")
    if len(set(bits)) != len(bits):
        raise UserError(f"{what}: a bit-width stands twice in {list(bits)}; remove one")
    return tuple(sorted(bits))


class BitWidth(nn.Module):
    """The bit-width of one tensor, chosen from an allowed set.

    While it learns it has one parameter `theta` of shape (1,). Where the set holds a single width,
    or `learned` is false, it has the integer buffer `fixed` instead, which `start_at` can still
    change. `freeze` replaces theta by the integer buffer `frozen`, for good.
    `marginal` is a running mean of the derivative of the *task* loss with respect to the
    bit-width, in loss per bit; the projection onto a budget ranks tensors by it.

    Args:
        allowed: allowed widths, ascending.
        start: width at the start.
        learned: whether gradient descent moves it.
        key: number of this bit-width in the model, part of the key of its draws.
    """

    theta: nn.Parameter | None
    fixed: Tensor | None
    frozen: Tensor | None
    marginal: Tensor
    decayed: Tensor
    _allowed: Tensor

    def __init__(
        self, allowed: tuple[int, ...], start: float = 8.0, learned: bool = True, key: int = 0
    ) -> None:
        """Start at `start`, or at the nearest allowed width where nothing is learned."""
        super().__init__()
        self.allowed, self.key = allowed, key
        self.start, self.wanted = start, learned
        self.learned = learned and len(allowed) > 1
        self.register_parameter("theta", None)
        self.register_buffer("fixed", None)
        self.register_buffer("frozen", None)
        self.register_buffer("marginal", torch.zeros(1))
        self.register_buffer("decayed", torch.full((1,), -1, dtype=torch.int64), False)
        self.register_buffer("_allowed", torch.tensor(allowed, dtype=torch.float32), False)
        self._marginal_step = -1
        self._width: int | None = None  # the integer buffer as a number: no device is asked
        if self.learned:
            self.theta = nn.Parameter(torch.zeros(1))
        else:
            self.fixed = torch.zeros(1, dtype=torch.int64)
        self.start_at(start)

    @property
    def is_frozen(self) -> bool:
        """Whether the width is an integer for good."""
        return self.frozen is not None

    def soft(self) -> Tensor:
        """The continuous bit-width, shape (1,), differentiable in theta."""
        if self.theta is not None:
            return widths.soft_bits(self.theta, self.allowed[0], self.allowed[-1])
        return self._allowed.new_full((1,), self.hard())

    def hard(self) -> int:
        """The integer width: the frozen one, else the allowed one nearest to the soft one."""
        if self._width is not None:
            return self._width
        return widths.nearest_bits(float(self.soft().detach()), self.allowed)

    def draw(self, u: float, step: int) -> widths.Draw | None:
        """An integer width for one training step; None where the width is not learned.

        Args:
            u: uniform on (-1/2, 1/2).
            step: number of the step; `marginal` decays once per step.
        """
        if self.theta is None:
            return None
        if self.theta.requires_grad and torch.is_grad_enabled() and step != self._marginal_step:
            self._marginal_step = step
            self.marginal.mul_(widths.MARGINAL_DECAY)
        return widths.draw(self.theta, self.allowed, u, self.marginal, self._allowed)

    def sample(self, u: float, step: int) -> Tensor:
        """The width of a draw, shape (1,), or the width that is not learned."""
        draw = self.draw(u, step)
        return self.soft() if draw is None else widths.drawn_bits(draw)

    def tie(self, other: BitWidth) -> None:
        """Learn one bit-width with `other`, which has the same allowed set."""
        if self.theta is not None and other.theta is not None:
            self.theta = other.theta

    def freeze(self, bits: int | None = None) -> None:
        """Fix the width to `bits` (default: the nearest allowed one).

        Raises:
            UserError: `bits` is not allowed here, or the width is frozen at another.
        """
        width = self.hard() if bits is None else bits
        if self.is_frozen and width != self._width:
            raise UserError(f"the bit-width is frozen at {self._width} and cannot become {width}")
        if width not in self.allowed:
            raise UserError(f"bit-width {width} is not among the allowed {list(self.allowed)}")
        self.theta = None
        self.frozen = torch.full((1,), width, dtype=torch.int64, device=self._allowed.device)
        self._width = width

    def start_at(self, bits: float) -> None:
        """Let an unfrozen width continue from `bits`, for a warm start.

        Raises:
            UserError: the width is frozen.
        """
        if self.is_frozen:
            raise UserError(
                f"the bit-width is frozen at {self._width} and cannot be learned again"
            )
        if self.theta is not None:
            with torch.no_grad():
                self.theta.fill_(widths.theta_for(bits, self.allowed[0], self.allowed[-1]))
        elif self.fixed is not None:
            self._width = widths.nearest_bits(bits, self.allowed)
            self.fixed.fill_(self._width)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A checkpoint decides the phase: a frozen one freezes, a learning one thaws.
        if prefix + "frozen" in state_dict:
            if not self.is_frozen:
                self.freeze(self.allowed[0])
        elif self.is_frozen:
            self.frozen = None
            if self.learned:
                self.theta = nn.Parameter(torch.zeros_like(self._allowed[:1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._marginal_step = -1  # the clock may go back to a step that was there already
        self.decayed.fill_(-1)
        width = self.fixed if self.frozen is None else self.frozen
        self._width = None if width is None else int(width)
        if self._width not in (None, *self.allowed):
            errors: list[str] = args[-1]
            errors.append(f"{prefix}: {self._width} bits are not among {list(self.allowed)}")

    def extra_repr(self) -> str:
        """The allowed set and the present width."""
        state = "frozen" if self.is_frozen else ("learned" if self.learned else "fixed")
        return f"allowed={list(self.allowed)}, bits={self.hard()}, {state}"
