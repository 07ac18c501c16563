"""The one training loop: of the float model, of trials, of baselines."""

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
from nipq_search.train.config import TrainConfig
from nipq_search.train.forward import SharedForward, arithmetic
from nipq_search.train.optimizer import drop_group, make_optimizer
from nipq_search.train.parallel import ALONE, Team
from nipq_search.train.schedule import NOISE, TUNING, Schedule
from nipq_search.train.stability.average import Average
from nipq_search.train.stability.freezing import Freezing
from nipq_search.train.stability.oscillation import Oscillation, dampening

_FINITE_EVERY = 10
_NOTES = 12
"""Times that bit-widths are noted in a noise phase, beside its end."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


def seed_for(*words: int) -> int:
    """A seed below 2**31, a function of the words; every generator takes such a one."""
    return mix(*words) & 0x7FFFFFFF


def steps_in(loader: Iterable[Any]) -> int:
    """Batches in an epoch: the loader's length, else counted by going through it once.

    Raises:
        UserError: there are none.
    """
    length = getattr(loader, "__len__", None)
    steps = int(length()) if length is not None else sum(1 for _ in loader)
    if steps < 1:
        raise UserError("loader('train') gives no batches: the split is empty")
    return steps


@contextmanager
def _tuned_by(model: nn.Module, tuning: str) -> Iterator[None]:
    """Within the context, what quantizers compute in training once their widths are frozen."""
    found = list(quantizers(model).values())
    for quantizer in found:
        quantizer.rounds_once_frozen = tuning == "hard"
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.rounds_once_frozen = True


class Trainer:
    """Trains one model; its whole state can be saved and restored, to continue bit by bit.

    Args:
        task: gives batches and losses.
        model: float or prepared; trained in place.
        config: rates, phases, distillation.
        schedule: steps of the phases.
        seed: of the order of the data; the noise's seed is in the model.
        device: where the model is.
        budget: what the bit-widths must keep; needed for a prepared model that learns them.
        teacher: the float model or one of the task's own; None for no distillation.
        team: the processes that share every batch.
        samples: training samples processed before the first step, by calibration.
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
        """Build the optimizer; nothing is trained yet."""
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
    def phase(self) -> str:
        """The phase of the step that comes next."""
        return self.schedule.phase(self.step)

    def run(
        self,
        *,
        on_epoch: Callable[[CurvePoint], None],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Train to the end.

        Args:
            on_epoch: gets a point of the learning curve after every epoch.
            save: gets the whole state after every epoch, every few minutes, and on a stop.
            should_stop: asked after every step.

        Of several processes the leader's hooks are called, and its answers hold for all.

        Returns:
            True at the end, False where `should_stop` ended it; the state is saved then.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
        """
        quantized = self.schedule.quantized
        tuned = _tuned_by(self.model, self.config.tuning) if quantized else nullcontext()
        with tuned, self.team.shared_statistics(self.model):
            return self._run(on_epoch, save, should_stop)

    def _run(
        self,
        on_epoch: Callable[[CurvePoint], None],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        saved_at = time.monotonic()
        while self.step < self.schedule.total:
            for group in self._rest_of_epoch():
                self._train_step(group)
                if self.step >= self.schedule.total:
                    break
                if self.step % self.schedule.steps_per_epoch == 0:
                    continue  # the epoch is to be reported before anything is saved
                due = time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes
                stop, due = self.team.agreed(should_stop(), due)
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
            self.team.same_random_state()
            self.loss_sum.zero_()
            self.loss_count = 0
            self._save(save)
            saved_at = time.monotonic()
            if self.step < self.schedule.total and self.team.agreed(should_stop())[0]:
                return False
        return True

    def _save(self, save: Callable[[dict[str, Any]], None]) -> None:
        self.team.mean([self.loss_sum])
        if self.team.leads:
            save(self.state_dict())

    def use_average(self) -> None:
        """Give the model the averaged weights for good, where there are any; ends the training."""
        if self.average is not None:
            self.average.copy_to(self.model)

    def _rest_of_epoch(self) -> Iterator[list[Any]]:
        """The batches of the present epoch that are still to come, step by step."""
        schedule = self.schedule
        epoch, steps = divmod(self.step, schedule.steps_per_epoch)
        done = steps * schedule.accumulate
        loader = self.task.loader("train", self.config.batch_size, seed_for(self.seed, epoch))
        count = 0
        # A DataLoader draws from the global generator when an epoch begins; on a resume within
        # one that draw is in the restored state already.
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
                f"loader('train') gave {count} batches in epoch {epoch} and "
                f"{schedule.batches_per_epoch} before: epochs must be equally long"
            )

    def _enter_tuning(self) -> None:
        """Freeze the bit-widths onto the budget and take them from the optimizer."""
        if not self.schedule.quantized:
            return
        if any(not q.bits.is_frozen for q in quantizers(self.model).values()):
            self._note_bits()
            freeze(self.model, self.budget)
            self.optimizer.zero_grad(set_to_none=True)
            drop_group(self.optimizer, "bits")

    def _note_bits(self) -> None:
        """Note where learned bit-widths are, and the loss's derivative by them."""
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
        if self.phase == TUNING:
            self._enter_tuning()
        elif self.phase == NOISE and self.step % max(1, self.schedule.noise // _NOTES) == 0:
            self._note_bits()
        if self.phase != NOISE and self.config.ema and self.average is None:
            self.average = Average(self.model, self.config.ema)
        for part in self.optimizer.param_groups:
            part["lr"] = part["base_lr"] * self.schedule.rate(self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(group, start=1):
            own, weight = self.team.take_share(self.task, self.model, batch)
            moved = to_device(self.task, own, self.device)
            draws = self.team.own_random_state(seed_for(self.seed, self.step, index))
            with arithmetic(self.config.precision, self.device), draws:
                loss = self._loss(moved, weight)
            if index == len(group) and self.phase == NOISE and self.budget is not None:
                penalty = self.config.lambda_ * cost_penalty(self.model, self.budget)
                loss = loss + len(group) * penalty  # the mean over the group has it once
            if index == len(group) and self.phase == TUNING and self.config.dampening:
                loss = loss + len(group) * self.config.dampening * dampening(self.model)
            loss.backward()  # type: ignore[no-untyped-call]
            self.samples += num_samples(self.task, batch)
        self.team.mean_gradients(self.model)
        if len(group) > 1:
            # Not the losses: a bit-width's `marginal` is a derivative of the loss of a batch.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(len(group))
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        if self.phase == TUNING and self.freezing is not None:
            self.freezing.update(self.model)
        if self.average is not None:
            self.average.update(self.model)
        if self.phase == TUNING:
            self.oscillation.update(self.model)
        self.step += 1
        if self.step % _FINITE_EVERY == 0:
            self._check_finite()

    def _loss(self, batch: Any, weight: float) -> Tensor:
        """The task's loss of a batch, distillation included, by its weight in the mean."""
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
        self.team.mean([self.loss_sum])
        if not math.isfinite(float(self.loss_sum)):
            raise NonFiniteLoss(
                f"the loss became {float(self.loss_sum)} within step {self.step} "
                f"({self.schedule.phase(max(0, self.step - 1))} phase): a lower lr may help"
            )

    def _curve_point(self) -> CurvePoint:
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
            phase=self.schedule.phase(max(0, self.step - 1)),
            timestamp=time.time(),
            metrics=metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
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
        """Continue from a saved state."""
        self.step, self.samples = state["step"], state["samples"]
        self.loss_sum = state["loss_sum"].to(self.device)
        self.loss_count = state["loss_count"]
        self.history = list(state.get("history", []))
        if "oscillation" in state:
            self.oscillation.load_state_dict(state["oscillation"], self.device)
        if self.freezing is not None and "freezing" in state:
            self.freezing.load_state_dict(state["freezing"], self.device)
        self.model.load_state_dict(state["model"])
        # A checkpoint of the tuning phase has no group of bits: build the groups to match.
        self.optimizer = make_optimizer(self.model, self.config, self.schedule.quantized)
        self.optimizer.load_state_dict(state["optimizer"])
        if "average" in state:
            self.average = Average(self.model, self.config.ema)
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
