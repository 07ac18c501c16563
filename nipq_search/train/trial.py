"""A complete training run from its specification: the float model, a trial or a baseline.

A trial has these phases: calibration, the noise phase, projection and freezing of the bit-widths,
the tuning phase, re-estimation of the normalization statistics, and evaluation. A training run may
be killed at any point; when it is started again, it resumes from its last checkpoint and produces
bit-identical results.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nipq_search import blobs, file_io
from nipq_search.cost import Budget, exact_costs, freeze
from nipq_search.quant import QUANTIZERS, bit_config, reestimate_norm_stats
from nipq_search.records import CurvePoint
from nipq_search.tasks import Task
from nipq_search.tasks.base import evaluate, num_samples, to_device
from nipq_search.train.checkpoint import load_checkpoint, save_checkpoint, to_bytes
from nipq_search.train.config import BitStart
from nipq_search.train.forward import arithmetic
from nipq_search.train.loop import Trainer, seed_for, steps_in
from nipq_search.train.models import MODEL_FILE, load_float, prepare_for, teacher_of
from nipq_search.train.parallel import ALONE, Team
from nipq_search.train.schedule import Schedule, make_schedule
from nipq_search.train.spec import Hooks, Interrupted, Paused, Released, TrainResult, TrainSpec


def train(
    task: Task,
    spec: TrainSpec,
    folder: Path,
    device: torch.device,
    hooks: Hooks | None = None,
    team: Team = ALONE,
    model_folder: Path | None = None,
) -> TrainResult:
    """Train to the end, resuming from the checkpoints in `folder` if there are any.

    Checkpoints are written below `folder/checkpoints`, and the model to `model.pt` in
    `model_folder`. The caller removes the checkpoints once it has stored the result. If `spec`
    names a float model and no quantization, that model is only evaluated and stored.

    Args:
        task: model and data.
        spec: the specification of the training run.
        folder: working folder of the training run.
        device: device to train on.
        hooks: progress reports and stop requests; in a team, only the leader's hooks matter.
        team: the processes that train together; each of them calls this function.
        model_folder: folder for the trained model; defaults to `folder`.

    Returns:
        Validation metrics, exact costs and bit-widths of the trained model.

    Raises:
        Released: this process does not lead, and its share of the work is done.
        Interrupted: `hooks.should_stop` returned true; the state is saved.
        Paused: training reached `spec.pause`; the state is saved.
        NonFiniteLoss: the loss became NaN or infinite.
        UserError: the float model cannot be read, or the budget cannot be reached.
    """
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        return _Training(
            task=task,
            spec=spec,
            folder=folder,
            device=device,
            hooks=hooks or Hooks(),
            team=team,
            model_folder=model_folder or folder,
        ).run()


@dataclass(frozen=True, kw_only=True)
class _Training:
    """One training run: the arguments of `train`, and a method for each phase."""

    task: Task
    spec: TrainSpec
    folder: Path
    device: torch.device
    hooks: Hooks
    team: Team
    model_folder: Path

    def run(self) -> TrainResult:
        """Run all remaining phases."""
        if self.spec.quant is None and self.spec.float_model is not None:
            model = self._float_model()
            self._release_others()
            return self._finish(model)
        trainer = self._prepare()
        progress = self._optimize(trainer)
        self._release_others()
        total = trainer.schedule.total
        if progress.pause <= trainer.step and progress.pause < total:
            raise self._at_pause(trainer)
        if trainer.step < total:
            raise Interrupted
        trainer.use_average()
        result = self._finish(trainer.model, trainer.samples, trainer.step, trainer.history)
        progress.report(result.samples)
        return result

    def _float_model(self) -> nn.Module:
        """Build the float model, with the weights in its file if there is one."""
        return load_float(self.task, self.spec.float_model, self.spec.seed, self.device)

    def _prepare(self) -> Trainer:
        """Prepare and calibrate the model, or restore it from the newest checkpoint."""
        model = self._float_model()
        spec, schedule = self._scheduled()
        checkpoint = load_checkpoint(self.folder / "checkpoints") if self.team.leads else None
        checkpoint = self.team.broadcast(checkpoint)
        teacher, samples = None, 0
        if spec.quant is not None:
            if spec.train.distill and spec.train.distill_weight > 0:
                teacher = teacher_of(self.task, model, spec.seed, self.device)
            model, samples = prepare_for(
                self.task, model, spec, self.device, calibrated=checkpoint is None
            )
            self.hooks.on_samples(samples)
        self.team.broadcast_model(model)
        # A model with one width for all tensors is not projected: its width must not change.
        projected = spec.budget if spec.train.start != BitStart.UNIFORM else None
        trainer = Trainer(
            task=self.task,
            model=model,
            config=spec.train,
            schedule=schedule,
            seed=spec.seed,
            device=self.device,
            budget=Budget(**projected) if projected else None,
            teacher=teacher,
            team=self.team,
            samples=samples,
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        return trainer

    def _scheduled(self) -> tuple[TrainSpec, Schedule]:
        """Return the specification and its schedule, dropping a noise phase that is too short."""
        loader = self.task.loader("train", self.spec.train.batch_size, seed_for(self.spec.seed, 0))
        batches = steps_in(loader)
        schedule = _schedule(self.spec, batches)
        if not 0 < schedule.noise < self.spec.least_noise_steps:
            return self.spec, schedule
        config = dataclasses.replace(self.spec.train, noise_share=0.0)
        spec = dataclasses.replace(self.spec, train=config)
        return spec, _schedule(spec, batches)

    def _optimize(self, trainer: Trainer) -> _Progress:
        """Run the noise phase, the projection and the tuning phase, up to the pause, if any."""
        total = trainer.schedule.total
        pause = total if self.spec.pause is None else max(1, round(self.spec.pause * total))
        progress = _Progress(trainer, self.hooks, self.folder, self.spec.home, pause)
        try:
            if trainer.step < pause:
                trainer.run(
                    on_epoch=progress.on_epoch,
                    save=progress.save,
                    should_stop=progress.should_stop,
                )
        finally:
            progress.report(trainer.samples)  # includes the samples of a step that failed
        return progress

    def _release_others(self) -> None:
        """Raise `Released` in every process but the leader, which runs the other phases alone."""
        if not self.team.leads:
            raise Released

    def _at_pause(self, trainer: Trainer) -> Paused:
        """Return `Paused` with the metrics of a copy of the model, projected onto the budget.

        Without the projection, a model that still exceeds its budget would score too high.
        """
        model = copy.deepcopy(trainer.model)
        if trainer.average is not None:
            trainer.average.copy_to(model)
        freeze(model, trainer.budget)
        samples = self._reestimate(model)
        self.hooks.on_samples(samples)
        return Paused(self._evaluate(model), samples)

    def _finish(
        self,
        model: nn.Module,
        samples: int = 0,
        steps: int = 0,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> TrainResult:
        """Re-estimate normalization statistics, evaluate and store the model.

        Args:
            model: the trained model.
            samples: number of training samples processed so far.
            steps: number of optimizer steps taken.
            history: see `TrainResult`.

        Returns:
            The result; its sample count includes the re-estimation.
        """
        samples += self._reestimate(model)
        metrics = self._evaluate(model)
        data = to_bytes({"model": model.state_dict()})
        self.hooks.before_write()
        blobs.write(self.model_folder / MODEL_FILE, data, self.spec.home)
        return TrainResult(
            metrics=metrics,
            cost=exact_costs(model) if self.spec.quant is not None else {},
            bits=bit_config(model) if self.spec.quant is not None else {},
            samples=samples,
            steps=steps,
            model_sha256=file_io.digest(data),
            history=tuple(history),
        )

    def _reestimate(self, model: nn.Module) -> int:
        """Re-estimate the normalization statistics; return the number of samples used."""
        if self.spec.quant is None or not self.spec.train.norm_batches:
            return 0
        counts: list[int] = []

        def run_batches(observed: nn.Module) -> None:
            for batch, count in self._full_batches():
                counts.append(count)
                self.task.loss(observed, to_device(self.task, batch, self.device))

        with arithmetic(self.spec.train.precision, self.device):
            reestimate_norm_stats(model, run_batches)
        return sum(counts)

    def _full_batches(self) -> Iterator[tuple[Any, int]]:
        """Yield the batches for normalization statistics, each with its number of samples.

        Partial batches are skipped, since the average would give them the weight of full ones.
        """
        seed = seed_for(self.spec.seed, 1 << 41)
        loader = self.task.loader("train", self.spec.train.batch_size, seed)
        first = 0
        for batch in itertools.islice(iter(loader), self.spec.train.norm_batches):
            count = num_samples(self.task, batch)
            first = first or count
            if count >= first:
                yield batch, count

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the task's metrics on the validation split."""
        with arithmetic(self.spec.train.precision, self.device):
            return evaluate(self.task, model, "validation")


class _Progress:
    """Forwards a trainer's progress to the caller's hooks and writes its checkpoints.

    Args:
        trainer: the trainer; the samples that it has processed so far are already reported.
        hooks: the caller's hooks.
        folder: folder of the training run, which contains its checkpoints.
        home: see `TrainSpec.home`.
        pause: step at which to stop.
    """

    def __init__(
        self, trainer: Trainer, hooks: Hooks, folder: Path, home: str | None, pause: int
    ) -> None:
        """Start counting at the trainer's current number of samples."""
        self.trainer, self.hooks, self.home, self.pause = trainer, hooks, home, pause
        self.checkpoints = folder / "checkpoints"
        self._reported = trainer.samples

    def report(self, samples: int) -> None:
        """Report the samples processed since the last call, given the total so far."""
        self.hooks.on_samples(samples - self._reported)
        self._reported = samples

    def should_stop(self) -> bool:
        """Report the samples so far, and return whether training must stop after this step."""
        self.report(self.trainer.samples)
        return self.trainer.step >= self.pause or self.hooks.should_stop()

    def on_epoch(self, point: CurvePoint) -> None:
        """Report the number of samples processed so far, then a point on the learning curve."""
        self.report(self.trainer.samples)
        self.hooks.on_epoch(point)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, unless `hooks.before_write` raises an exception."""
        fence = self.hooks.before_write
        fence()
        save_checkpoint(self.checkpoints, self.trainer.step, state, self.home, fence=fence)


def _schedule(spec: TrainSpec, batches_per_epoch: int) -> Schedule:
    """Return the schedule of a training run."""
    return make_schedule(
        epochs=spec.train.epochs,
        batches_per_epoch=batches_per_epoch,
        accumulate=spec.train.accumulate,
        noise_share=spec.train.noise_share,
        warmup=spec.train.warmup,
        quantized=spec.quant is not None,
        learns_bits=spec.quant is not None and QUANTIZERS[spec.quant.quantizer].learns_bits,
    )
