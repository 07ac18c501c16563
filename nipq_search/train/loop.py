"""The training loop, shared by the float model, trials and baselines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.cost import Budget, cost_estimate, cost_penalty, freeze
from nipq_search.errors import UserError
from nipq_search.quant import quantizers
from nipq_search.quant.numerics.noise import mix
from nipq_search.records import CurvePoint
from nipq_search.tasks import Task
from nipq_search.tasks.base import distill_loss, evaluate, num_samples, to_device
from nipq_search.train.config import TrainConfig, TuningMode
from nipq_search.train.forward import SharedForward, arithmetic
from nipq_search.train.optimizer import drop_group, make_optimizer
from nipq_search.train.parallel import ALONE, Team
from nipq_search.train.schedule import Phase, Schedule
from nipq_search.train.stability.average import Average
from nipq_search.train.stability.freezing import Freezing
from nipq_search.train.stability.oscillation import Oscillation, dampening

_FINITE_EVERY = 10
"""Steps between two checks that the loss is finite; each check synchronizes with the device."""

_RECORDINGS = 12
"""Approximate number of times that the bit-widths are recorded before a noise phase ends."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


def seed_for(*words: int) -> int:
    """Hash integers to a seed below 2**31, which every random number generator accepts."""
    return mix(*words) & 0x7FFFFFFF


def steps_in(loader: Iterable[Any]) -> int:
    """Return the number of batches per epoch: the loader's length, or a count over one epoch.

    Raises:
        UserError: the loader is empty.
    """
    length = getattr(loader, "__len__", None)
    batches = int(length()) if length is not None else sum(1 for _ in loader)
    if batches < 1:
        raise UserError("loader('train') yields no batches: the split is empty")
    return batches


@contextmanager
def _tuning_mode(model: nn.Module, tuning: str) -> Iterator[None]:
    """Set whether frozen quantizers round or add noise in training; restore rounding on exit."""
    found = list(quantizers(model).values())
    for quantizer in found:
        quantizer.rounds_once_frozen = tuning == TuningMode.HARD
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.rounds_once_frozen = True


class Trainer:
    """Trains one model, and can continue from a saved state with bit-identical results.

    Args:
        task: provides batches and losses.
        model: a float or prepared model, trained in place.
        config: settings for the training run.
        schedule: phases and learning rate by step.
        seed: seed of the data order; the seed of the noise is stored in the model.
        device: device of the model.
        budget: cost targets; None adds no penalty to the loss and, before the tuning phase, rounds
            learned bit-widths to the nearest allowed ones.
        teacher: the task's teacher or the float model; None disables distillation.
        team: the processes that share each batch.
        samples: number of training samples that calibration has processed.
    """

    def __init__(
        self,
        *,
        task: Task,
        model: nn.Module,
        config: TrainConfig,
        schedule: Schedule,
        seed: int,
        device: torch.device,
        budget: Budget | None = None,
        teacher: nn.Module | None = None,
        team: Team = ALONE,
        samples: int = 0,
    ) -> None:
        """Create the optimizer; training starts with `run`."""
        self.team = team
        self.task, self.model, self.config, self.schedule = task, model, config, schedule
        self.seed, self.device, self.budget, self.teacher = seed, device, budget, teacher
        self.step = 0
        self.samples = samples
        self.loss_sum = torch.zeros((), device=device)
        self.loss_count = 0
        self.optimizer = make_optimizer(model, config, schedule.quantized)
        self.average: Average | None = None
        self.history: list[dict[str, Any]] = []
        self.oscillation = Oscillation()
        self.freezing = Freezing(config.freezing) if config.freezing else None

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.schedule.phase(self.step)

    def run(
        self,
        *,
        on_epoch: Callable[[CurvePoint], None],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Train to the end, or until a stop is requested.

        In a team, only the leader's callbacks matter.

        Args:
            on_epoch: called with a point of the learning curve after every epoch.
            save: called with the complete state after every epoch, every
                `config.checkpoint_minutes` and before a stop.
            should_stop: called after every step; True stops the training run.

        Returns:
            Whether training ran to the end. Otherwise, its state is saved.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
            RuntimeError: an epoch has a different number of batches than the schedule.
        """
        quantized = self.schedule.quantized
        tuned = _tuning_mode(self.model, self.config.tuning) if quantized else nullcontext()
        with tuned, self.team.shared_statistics(self.model):
            return self._run(on_epoch, save, should_stop)

    def _run(
        self,
        on_epoch: Callable[[CurvePoint], None],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Run the training loop, inside the contexts that `run` enters."""
        saved_at = time.monotonic()
        while self.step < self.schedule.total:
            for group in self._rest_of_epoch():
                self._train_step(group)
                if self.step >= self.schedule.total:
                    break
                if self.step % self.schedule.steps_per_epoch == 0:
                    continue  # report the epoch before saving
                due = time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes
                stop, due = self.team.broadcast_flags(should_stop(), due)
                if stop or due:
                    self._save(save)
                    saved_at = time.monotonic()
                if stop:
                    return False
            self._check_finite()
            if self.step >= self.schedule.total:
                self._enter_tuning()
            if self.team.leads:
                on_epoch(self._curve_point())
            self.team.broadcast_random_state()
            self.loss_sum.zero_()
            self.loss_count = 0
            self._save(save)
            saved_at = time.monotonic()
            if self.step < self.schedule.total and self.team.broadcast_flags(should_stop())[0]:
                return False
        return True

    def _save(self, save: Callable[[dict[str, Any]], None]) -> None:
        """Average the loss over the team and, in the leader, pass the state to `save`."""
        self.team.mean([self.loss_sum])
        if self.team.leads:
            save(self.state_dict())

    def use_average(self) -> None:
        """After training, replace the weights with their moving average, if there is one."""
        if self.average is not None:
            self.average.copy_to(self.model)

    def _rest_of_epoch(self) -> Iterator[list[Any]]:
        """Yield the remaining batches of the current epoch, grouped by step."""
        schedule = self.schedule
        epoch, steps = divmod(self.step, schedule.steps_per_epoch)
        done = steps * schedule.accumulate
        loader = self.task.loader("train", self.config.batch_size, seed_for(self.seed, epoch))
        count = 0
        # A DataLoader draws from the global generator when an epoch begins. After a resume within
        # an epoch, the restored state already includes that draw.
        rng = torch.get_rng_state() if done else None
        group: list[Any] = []
        for index, batch in enumerate(loader):
            count += 1
            if index == done and rng is not None:
                torch.set_rng_state(rng)
            if done <= index < schedule.batches_per_epoch:
                group.append(batch)
                if len(group) == schedule.accumulate or index + 1 == schedule.batches_per_epoch:
                    yield group
                    group = []
        if count != schedule.batches_per_epoch and self.step < schedule.total:
            raise RuntimeError(
                f"loader('train') yielded {count} batches in epoch {epoch} but "
                f"{schedule.batches_per_epoch} before: all epochs must have the same length"
            )

    def _enter_tuning(self) -> None:
        """Project the bit-widths onto the budget, freeze them and drop them from the optimizer."""
        if not self.schedule.quantized:
            return
        if any(not q.bits.is_frozen for q in quantizers(self.model).values()):
            self._record_bits()
            freeze(self.model, self.budget)
            self.optimizer.zero_grad(set_to_none=True)
            drop_group(self.optimizer, "bits")

    def _record_bits(self) -> None:
        """Record the learned bit-widths and the derivatives of the loss with respect to them."""
        learned = {
            n: q.bits for n, q in quantizers(self.model).items() if q.bits.theta is not None
        }
        if learned:
            self.history.append(
                {
                    "step": self.step,
                    "bits": {n: float(b.soft().detach()) for n, b in learned.items()},
                    "gradient": {n: float(b.marginal) for n, b in learned.items()},
                }
            )

    def _train_step(self, group: Sequence[Any]) -> None:
        """Take one optimizer step on the mean loss of a group of batches."""
        self._prepare_step()
        for part in self.optimizer.param_groups:
            part["lr"] = part["base_lr"] * self.schedule.rate(self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(group)
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        if self.phase is Phase.TUNING and self.freezing is not None:
            self.freezing.update(self.model)
        if self.average is not None:
            self.average.update(self.model)
        if self.phase is Phase.TUNING:
            self.oscillation.update(self.model)
        self.step += 1
        if self.step % _FINITE_EVERY == 0:
            self._check_finite()

    def _prepare_step(self) -> None:
        """Enter the tuning phase, record bit-widths or start averaging, if due at this step."""
        if self.phase is Phase.TUNING:
            self._enter_tuning()
        elif self.phase is Phase.NOISE:
            if self.step % max(1, self.schedule.noise // _RECORDINGS) == 0:
                self._record_bits()
        if self.phase is not Phase.NOISE and self.config.ema and self.average is None:
            self.average = Average(self.model, self.config.ema)

    def _backward(self, group: Sequence[Any]) -> None:
        """Compute the gradients of the mean loss of a group of batches."""
        for index, batch in enumerate(group, start=1):
            own, weight = self.team.take_share(self.task, self.model, batch)
            moved = to_device(self.task, own, self.device)
            draws = self.team.own_random_state(seed_for(self.seed, self.step, index))
            with arithmetic(self.config.precision, self.device), draws:
                loss = self._loss(moved, weight)
            if index == len(group):
                loss = self._regularized(loss, len(group))
            loss.backward()  # type: ignore[no-untyped-call]
            self.samples += num_samples(self.task, batch)
        self.team.mean_gradients(self.model)
        if len(group) > 1:
            # Scale gradients, not losses: `marginal` must remain the derivative of a batch loss.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(len(group))

    def _regularized(self, loss: Tensor, batches: int) -> Tensor:
        """Add the budget penalty or dampening, times `batches`: gradients are averaged later."""
        if self.phase is Phase.NOISE and self.budget is not None:
            penalty = self.config.lambda_ * cost_penalty(self.model, self.budget)
            loss = loss + batches * penalty
        if self.phase is Phase.TUNING and self.config.dampening:
            loss = loss + batches * self.config.dampening * dampening(self.model)
        return loss

    def _loss(self, batch: Any, weight: float) -> Tensor:
        """Return and record the loss of this process's share of a batch, times `weight`."""
        model: Any = SharedForward(self.model)
        share = self.config.distill_weight if self.teacher is not None else 0.0
        loss = torch.zeros((), device=self.device)
        if share < 1:
            loss = loss + (1 - share) * self.task.loss(model, batch)
        if self.teacher is not None and share > 0:
            loss = loss + share * distill_loss(self.task, model, self.teacher, batch)
        if self.team.size > 1:
            loss = weight * loss
        self.loss_sum += loss.detach()
        self.loss_count += 1
        return loss

    def _check_finite(self) -> None:
        """Raise `NonFiniteLoss` if a loss of this epoch was NaN or infinite."""
        self.team.mean([self.loss_sum])
        if not math.isfinite(float(self.loss_sum)):
            raise NonFiniteLoss(
                f"the loss became {float(self.loss_sum)} by step {self.step} "
                f"({self.schedule.phase(max(0, self.step - 1))} phase); a lower lr may help"
            )

    def _curve_point(self) -> CurvePoint:
        """Validate the model and return the epoch's point of the learning curve."""
        metrics = {"train_loss": float(self.loss_sum) / max(1, self.loss_count)}
        average = self.average
        averaged = nullcontext() if average is None else average.applied(self.model)
        with averaged, arithmetic(self.config.precision, self.device):
            validation = evaluate(self.task, self.model, "validation")
        metrics.update({f"validation_{name}": value for name, value in validation.items()})
        if (oscillating := self.oscillation.share()) is not None:
            metrics["oscillating_weights"] = oscillating
        if self.freezing is not None and (fixed := self.freezing.share()) is not None:
            metrics["fixed_weights"] = fixed
        metrics["lr"] = self.config.lr * self.schedule.rate(max(0, self.step - 1))
        if self.schedule.quantized and self.budget is not None:
            with torch.no_grad():
                for name in self.budget:
                    metrics[f"{name}_estimate"] = float(cost_estimate(name, self.model))
        return CurvePoint(
            epoch=math.ceil(self.step / self.schedule.steps_per_epoch),
            step=self.step,
            phase=self.schedule.phase(max(0, self.step - 1)).value,
            timestamp=time.time(),
            metrics=metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the remaining training steps depend on."""
        state = {
            "step": self.step,
            "samples": self.samples,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "history": self.history,
            "oscillation": self.oscillation.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.freezing is not None:
            state["freezing"] = self.freezing.state_dict()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.step, self.samples = state["step"], state["samples"]
        self.loss_sum = state["loss_sum"].to(self.device)
        self.loss_count = state["loss_count"]
        self.history = list(state.get("history", []))
        if "oscillation" in state:
            self.oscillation.load_state_dict(state["oscillation"], self.device)
        if self.freezing is not None and "freezing" in state:
            self.freezing.load_state_dict(state["freezing"], self.device)
        self.model.load_state_dict(state["model"])
        # A model in the tuning phase has no bit-width parameters: recreate the parameter groups.
        self.optimizer = make_optimizer(self.model, self.config, self.schedule.quantized)
        self.optimizer.load_state_dict(state["optimizer"])
        if "average" in state:
            self.average = Average(self.model, self.config.ema)
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
