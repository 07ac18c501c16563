"""Bit-width of a tensor: learned as a parameter, then frozen as an integer buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.errors import UserError
from nipq_search.quant.numerics import widths

MIN_BITS, MAX_BITS = 1, 16


def check_bits(bits: Sequence[int], key: str) -> tuple[int, ...]:
    """Check a set of allowed bit-widths and return it in ascending order.

    Args:
        bits: the bit-widths.
        key: key of the setting, for messages.

    Raises:
        UserError: the set is empty, repeats a bit-width, or contains anything other than integers
            from 1 to 16.
    """
    if not bits:
        raise UserError(f"{key}: no bit-width is allowed; give a list such as [2, 4, 8]")
    for width in bits:
        whole = isinstance(width, int) and not isinstance(width, bool)
        if not whole or not MIN_BITS <= width <= MAX_BITS:
            raise UserError(f"{key}: {width!r} is not a bit-width; use integers from 1 to 16")
    if len(set(bits)) != len(bits):
        raise UserError(f"{key}: {list(bits)} repeats a bit-width; remove the duplicate")
    return tuple(sorted(bits))


class BitWidth(nn.Module):
    """Bit-width of one tensor, chosen from an allowed set.

    A learned bit-width has one parameter `theta` of shape (1,). If the set has a single width, or
    `learned` is false, the integer buffer `fixed` is used instead; `start_at` can change it.
    `freeze` sets the integer buffer `frozen`, which no optimizer updates, and removes theta.
    `marginal` is a running mean of the derivative of the *task* loss with respect to the
    bit-width, in loss per bit; the projection onto a budget ranks tensors by it.

    Args:
        allowed: allowed bit-widths in bits, ascending.
        start: initial bit-width in bits.
        learned: whether the bit-width is learned by gradient descent.
        key: index of the bit-width in the model; part of the key that determines its random
            draws.
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
        """Initialize at `start`, within the limits described in `start_at`."""
        super().__init__()
        self.allowed, self.key = allowed, key
        self.start, self.learnable = start, learned
        self.learned = learned and len(allowed) > 1
        self.register_parameter("theta", None)
        self.register_buffer("fixed", None)
        self.register_buffer("frozen", None)
        self.register_buffer("marginal", torch.zeros(1))
        self.register_buffer("decayed", torch.full((1,), -1, dtype=torch.int64), False)
        self.register_buffer("_allowed", torch.tensor(allowed, dtype=torch.float32), False)
        self._marginal_step = -1
        self._width: int | None = None  # copy of the integer buffer; avoids device synchronization
        if self.learned:
            self.theta = nn.Parameter(torch.zeros(1))
        else:
            self.fixed = torch.zeros(1, dtype=torch.int64)
        self.start_at(start)

    @property
    def is_frozen(self) -> bool:
        """Whether the bit-width is frozen."""
        return self.frozen is not None

    def soft(self) -> Tensor:
        """Return the continuous bit-width, shape (1,), differentiable in theta.

        Without theta, this is the fixed or frozen bit-width.
        """
        if self.theta is not None:
            return widths.soft_bits(self.theta, self.allowed[0], self.allowed[-1])
        return self._allowed.new_full((1,), self.hard())

    def hard(self) -> int:
        """Return the fixed or frozen bit-width, or the allowed width nearest to a learned one."""
        if self._width is not None:
            return self._width
        return widths.nearest_bits(float(self.soft().detach()), self.allowed)

    def draw(self, u: float, step: int) -> widths.Draw | None:
        """Draw an integer bit-width for one training step, or return None if there is no theta.

        Args:
            u: uniform random number from (-1/2, 1/2).
            step: index of the training step; `marginal` decays once per step.
        """
        if self.theta is None:
            return None
        if self.theta.requires_grad and torch.is_grad_enabled() and step != self._marginal_step:
            self._marginal_step = step
            self.marginal.mul_(widths.MARGINAL_DECAY)
        return widths.draw(self.theta, self.allowed, u, self.marginal, self._allowed)

    def sample(self, u: float, step: int) -> Tensor:
        """Return a drawn bit-width, shape (1,), or the fixed or frozen one; see `draw`."""
        draw = self.draw(u, step)
        return self.soft() if draw is None else widths.drawn_bits(draw)

    def tie(self, other: BitWidth) -> None:
        """Use the theta of `other`, which has the same allowed set, if both are learned."""
        if self.theta is not None and other.theta is not None:
            self.theta = other.theta

    def freeze(self, bits: int | None = None) -> None:
        """Freeze the bit-width at `bits` (default: the nearest allowed width).

        Raises:
            UserError: `bits` is not allowed, or the bit-width is frozen at a different value.
        """
        width = self.hard() if bits is None else bits
        if self.is_frozen and width != self._width:
            raise UserError(
                f"the bit-width is frozen at {self._width} and cannot change to {width}"
            )
        if width not in self.allowed:
            raise UserError(f"bit-width {width} is not allowed; choose from {list(self.allowed)}")
        self.theta = None
        self.frozen = torch.full((1,), width, dtype=torch.int64, device=self._allowed.device)
        self._width = width

    def start_at(self, bits: float) -> None:
        """Set the bit-width from which training continues, as in a warm start.

        A learned bit-width is set to `bits` within the limits of `widths.theta_for`, a fixed one
        to the nearest allowed width.

        Raises:
            UserError: the bit-width is frozen.
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
        # The checkpoint determines the phase: loading may freeze or unfreeze the bit-width.
        if prefix + "frozen" in state_dict:
            if not self.is_frozen:
                self.freeze(self.allowed[0])
        elif self.is_frozen:
            self.frozen = None
            if self.learned:
                self.theta = nn.Parameter(torch.zeros_like(self._allowed[:1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._marginal_step = -1  # the noise clock may be set to an earlier step
        self.decayed.fill_(-1)
        width = self.fixed if self.frozen is None else self.frozen
        self._width = None if width is None else int(width)
        if self._width not in (None, *self.allowed):
            errors: list[str] = args[-1]  # torch raises one error with all of these messages
            errors.append(
                f"{prefix}: {self._width} bits are not allowed; choose from {list(self.allowed)}"
            )

    def extra_repr(self) -> str:
        """Return the allowed set, the current bit-width and its state."""
        state = "frozen" if self.is_frozen else ("learned" if self.learned else "fixed")
        return f"allowed={list(self.allowed)}, bits={self.hard()}, {state}"
