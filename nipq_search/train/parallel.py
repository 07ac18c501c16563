"""One training by several processes: each computes its share of every batch.

Every process has the whole model and goes through the same batches. It computes losses and
gradients on a share of the samples; gradients, losses and the statistics of batch normalization
are the means over all of them, so each process takes the same step. Drawn bit-widths are the same
anyway, as functions of seed and step, and so is an element's noise, which hangs on its place in
the whole batch. Calibration and the normalization statistics of the end are computed whole by
whoever needs them. The result is that of one process but for the order of sums, for tables of
residuals (`proxy: empirical`), which each makes from its own share, and for dropout.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nipq_search.errors import UserError
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.tasks.base import num_samples, take
from nipq_search.train.spec import Interrupted, Paused, Released

_PATIENCE = datetime.timedelta(days=7)
"""The leader may evaluate for long; a training that hangs is ended by who watches it."""


class Team:
    """The processes of one training, seen from one of them. Alone, nothing is exchanged.

    Args:
        rank: number of this process; the first one, 0, leads: it evaluates and writes.
        size: how many there are.

    Attributes:
        copies: how many processes have each sample of the present batch: all of them, where there
            are fewer samples than processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Of a process group that exists already, where there are several."""
        self.rank, self.size = rank, size
        self.copies = 1

    @property
    def leads(self) -> bool:
        """Whether this process evaluates and writes."""
        return self.rank == 0

    def share(self, samples: int) -> slice:
        """Which of so many samples are this process's; all of them if there are too few."""
        if samples < self.size:
            return slice(0, samples)
        return slice(samples * self.rank // self.size, samples * (self.rank + 1) // self.size)

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place and at once."""
        if self.size == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype is dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            flat /= self.size
            parts = torch.split(flat, [t.numel() for t in same])
            for tensor, part in zip(same, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean_gradients(self, model: nn.Module) -> None:
        """Give every process the mean gradient. One that is missing somewhere counts as zero."""
        if self.size == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(there, op=dist.ReduceOp.MAX)
        found = []
        for parameter, exists in zip(parameters, there.tolist(), strict=True):
            if exists:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        self.mean(found)
        # The task loss's derivatives by the bit-widths, by which these are projected.
        self.mean([m.marginal for m in model.modules() if isinstance(m, BitWidth)])

    def agreed(self, *values: bool) -> list[bool]:
        """What the leader says."""
        if self.size == 1:
            return list(values)
        said = torch.tensor(values, dtype=torch.uint8)
        dist.broadcast(said, 0)
        return [bool(value) for value in said.tolist()]

    def given(self, value: Any) -> Any:
        """The leader's object: plain types and tensors on the CPU."""
        if self.size == 1:
            return value
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def same_model(self, model: nn.Module) -> None:
        """Take the leader's state: what each has computed may differ by a bit."""
        if self.size == 1:
            return
        state = model.state_dict() if self.leads else {}
        on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
        model.load_state_dict(self.given(on_cpu))

    def same_random_state(self) -> None:
        """Go on from the leader's generator: evaluation, which it does alone, draws from it."""
        if self.size > 1:
            state = torch.get_rng_state()
            dist.broadcast(state, 0)
            torch.set_rng_state(state)

    @contextlib.contextmanager
    def own_random_state(self, seed: int) -> Iterator[None]:
        """Draw, as dropout does, what no other process draws; afterwards go on as before.

        Args:
            seed: of the step.
        """
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed((seed + self.rank) & 0x7FFFFFFF)
            yield

    @contextlib.contextmanager
    def shared_statistics(self, model: nn.Module) -> Iterator[None]:
        """Within the context, batch normalization sees the whole batch in training."""
        kind = nn.modules.batchnorm._BatchNorm
        found = [m for m in model.modules() if isinstance(m, kind)] if self.size > 1 else []
        for module in found:
            # On the instance, for whatever kind of layer it is.
            shared = functools.partial(_normalized, self, module)
            module.forward = shared  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in found:
                del module.forward

    def take_share(self, task: object, model: nn.Module, batch: Any) -> tuple[Any, float]:
        """This process's share of a batch, and the weight of its loss in the mean.

        Args:
            task: knows its batches.
            model: prepared or not; its noise is told the place of the share.
            batch: as the task's loader gives it.

        Raises:
            UserError: the batch cannot be cut.
        """
        if self.size == 1:
            return batch, 1.0
        samples = num_samples(task, batch)
        part = self.share(samples)
        count = part.stop - part.start
        self.copies = self.size if samples < self.size else 1
        with contextlib.suppress(UserError):  # a float model has no noise
            quant_state(model).clock.share = (part.start, count, samples)
        return take(task, batch, part), count * self.size / samples / self.copies


class _Sum(torch.autograd.Function):
    """The sum over the processes; every one's loss hangs on every one's share of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def _normalized(team: Team, module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Batch normalization over the samples of all processes, as the layer's own over its own."""
    if not module.training:
        return type(module).forward(module, x)
    wide = x if x.dtype is torch.float64 else x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    own = wide.new_full((1,), x.numel() / x.shape[1])
    sums = _Sum.apply(torch.cat([wide.sum(dims), own]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = wide - mean.view(shape)
    variance = _Sum.apply(centered.square().sum(dims)) / count
    y = centered * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        y = y * module.weight.view(shape) + module.bias.view(shape)
    if module.track_running_stats:
        seen = count / team.copies
        _track(module, mean.detach(), variance.detach() * (seen / (seen - 1).clamp(min=1)))
    normalized: Tensor = y.to(x.dtype)
    return normalized


@torch.no_grad()
def _track(module: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of a batch; the variance is the unbiased one."""
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = module.momentum
    share = 1.0 / float(module.num_batches_tracked) if momentum is None else momentum
    for running, value in ((module.running_mean, mean), (module.running_var, variance)):
        assert running is not None
        running.lerp_(value.to(running.dtype), share)


ALONE = Team()
"""One process."""


@contextlib.contextmanager
def joined(store: Any, rank: int, size: int) -> Iterator[Team]:
    """Be one of the processes of a training, until the context ends.

    Args:
        store: of `torch.distributed`, where they find each other.
        rank: number of this one.
        size: how many there are.
    """
    # Tensors on GPUs by NCCL, decisions and everything on CPUs by Gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Team(rank, size)
    except (Interrupted, Paused, Released):
        dist.destroy_process_group()
        raise
    except BaseException:
        # NCCL would wait for the others, who know nothing of it.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        if torch.cuda.is_available() and abort is not None:
            abort()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
