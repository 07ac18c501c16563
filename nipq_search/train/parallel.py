"""Data-parallel training: several processes, each of which computes a share of every batch.

Every process holds the whole model and iterates over the same batches, but computes losses and
gradients only on its own share of the samples. Gradients, losses and batch normalization
statistics are averaged over the processes, so all of them take the same step. All processes draw
the same bit-widths, which are functions of the seed and the step. The noise of an element depends
on its position in the whole batch, so the noise does not depend on the division into shares.
Calibration and the final normalization statistics are not shared: each process that needs them
computes them on whole batches. The result differs from that of a single process only in the order
of summation, in dropout, and in residual tables (`proxy: empirical`), which each process builds
from its own share.
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

_TIMEOUT = datetime.timedelta(days=7)
"""Timeout of collectives: the leader's evaluation can be slow, and watchdogs kill hung jobs."""


class Team:
    """The processes of a training run, from the perspective of one of them.

    A team of one process needs no communication.

    Args:
        rank: index of this process. Rank 0 is the leader, which evaluates and writes files.
        size: number of processes.

    Attributes:
        copies: number of processes that compute each sample of the current batch: 1, or `size`
            if the batch has fewer samples than there are processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Create a view of the default process group, which must exist if `size` is above 1."""
        self.rank, self.size = rank, size
        self.copies = 1

    @property
    def leads(self) -> bool:
        """Whether this process evaluates and writes files."""
        return self.rank == 0

    def share(self, samples: int) -> slice:
        """Return this process's share of a batch of `samples`.

        A batch with fewer samples than processes is not divided: every process computes all of it.
        """
        if samples < self.size:
            return slice(0, samples)
        return slice(samples * self.rank // self.size, samples * (self.rank + 1) // self.size)

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the processes in place, with one collective per dtype."""
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
        """Average gradients and marginals over the processes, in place.

        A gradient that is missing in some processes counts as zero there; one that is missing in
        all processes stays None.
        """
        if self.size == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(present, op=dist.ReduceOp.MAX)
        found = []
        for parameter, exists in zip(parameters, present.tolist(), strict=True):
            if exists:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        self.mean(found)
        # The projection uses these derivatives of the task loss with respect to bit-widths.
        self.mean([m.marginal for m in model.modules() if isinstance(m, BitWidth)])

    def broadcast_flags(self, *values: bool) -> list[bool]:
        """Return the leader's values in every process."""
        if self.size == 1:
            return list(values)
        decided = torch.tensor(values, dtype=torch.uint8)
        dist.broadcast(decided, 0)
        return [bool(value) for value in decided.tolist()]

    def broadcast(self, value: Any) -> Any:
        """Return the leader's object in every process; all processes must call this method.

        Tensors in the object must be on the CPU.
        """
        if self.size == 1:
            return value
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def broadcast_model(self, model: nn.Module) -> None:
        """Load the leader's state into each `model`, since calibrations may differ by rounding."""
        if self.size == 1:
            return
        state = model.state_dict() if self.leads else {}
        on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
        model.load_state_dict(self.broadcast(on_cpu))

    def broadcast_random_state(self) -> None:
        """Copy the leader's generator state to all processes, since only the leader evaluates."""
        if self.size > 1:
            state = torch.get_rng_state()
            dist.broadcast(state, 0)
            torch.set_rng_state(state)

    @contextlib.contextmanager
    def own_random_state(self, seed: int) -> Iterator[None]:
        """Seed each process differently, for dropout; restore the generator on exit.

        A team of one process keeps its generator as it is.

        Args:
            seed: seed of the batch, the same in all processes.
        """
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed((seed + self.rank) & 0x7FFFFFFF)
            yield

    @contextlib.contextmanager
    def shared_statistics(self, model: nn.Module) -> Iterator[None]:
        """Within the context, let batch normalization in training use all processes' samples."""
        # torch has no public base class for its batch normalization modules.
        kind = nn.modules.batchnorm._BatchNorm
        found = [m for m in model.modules() if isinstance(m, kind)] if self.size > 1 else []
        for module in found:
            # Patch the instance, which works for every subclass of batch normalization.
            shared = functools.partial(_normalized, self, module)
            module.forward = shared  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in found:
                del module.forward

    def take_share(self, task: object, model: nn.Module, batch: Any) -> tuple[Any, float]:
        """Return this process's share of a batch.

        Args:
            task: the task, which slices the batch.
            model: a float or prepared model; a prepared model stores the position of the share,
                on which its noise depends.
            batch: a batch from the task's loader.

        Returns:
            The share, and the weight of its loss in the mean over the processes.

        Raises:
            UserError: the batch cannot be sliced.
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
    """Sum over the processes; gradients are summed too, since each summand affects every loss."""

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
    """Apply batch normalization with the statistics of the samples of all processes."""
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
        distinct = count / team.copies
        unbiased = variance.detach() * (distinct / (distinct - 1).clamp(min=1))
        _track(module, mean.detach(), unbiased)
    normalized: Tensor = y.to(x.dtype)
    return normalized


@torch.no_grad()
def _track(module: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics from a batch's mean and unbiased variance."""
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = module.momentum
    share = 1.0 / float(module.num_batches_tracked) if momentum is None else momentum
    for running, value in ((module.running_mean, mean), (module.running_var, variance)):
        assert running is not None
        running.lerp_(value.to(running.dtype), share)


ALONE = Team()
"""A team of one process."""


@contextlib.contextmanager
def joined(store: Any, rank: int, size: int) -> Iterator[Team]:
    """Join the process group of a training run until the context exits.

    Args:
        store: `torch.distributed` store through which the processes connect.
        rank: index of this process.
        size: number of processes.

    Yields:
        The team.
    """
    # NCCL transfers tensors on GPUs; Gloo transfers those on CPUs, such as stop decisions.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield Team(rank, size)
    except (Interrupted, Paused, Released):
        dist.destroy_process_group()
        raise
    except BaseException:
        # Destroying an NCCL group would wait for the other processes, which have not failed. The
        # function that aborts it is private to torch, so it may be missing.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        if torch.cuda.is_available() and abort is not None:
            abort()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
