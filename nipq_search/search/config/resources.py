"""Sections of a sweep file: what a trial gets, and when a sweep ends."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of a sweep file: frozen, and every key known."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class ResourcesSection(Section):
    """What one trial gets.

    Attributes:
        cpus: CPU cores of each of a trial's processes, which is also its torch threads.
        gpus: GPUs; fractions share one. Of several, each has a process, which train together.
        workers: processes of a trial that train together on CPUs.
        memory_gb: main memory that a trial reserves, in 1e9 bytes; a node takes no more trials
            than fit.
        custom: amounts of Ray's custom resources, for clusters of unlike nodes.
        concurrent: most trials at once; default as many as the cluster holds.
        autoscale: whether the cluster adds nodes while trials wait: `concurrent` trials are asked
            for at once, and no node has to be there yet.
    """

    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    workers: int = Field(default=1, ge=1)
    memory_gb: float | None = Field(default=None, gt=0)
    custom: dict[str, float] = Field(default_factory=dict)
    concurrent: int | None = Field(default=None, ge=1)
    autoscale: bool = False

    @model_validator(mode="after")
    def _check(self) -> ResourcesSection:
        if self.autoscale and self.concurrent is None:
            raise ValueError("concurrent: say for how many trials `autoscale` may add nodes")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError("gpus: above 1 only whole numbers")
        if self.workers > 1 and self.gpus:
            raise ValueError("workers: are for CPUs; with `gpus` each GPU has a process")
        for name, amount in self.custom.items():
            if name.lower() in ("cpu", "gpu", "memory", "object_store_memory"):
                raise ValueError(f"custom.{name}: has a setting of its own")
            if not 0 < amount < math.inf or (amount > 1 and amount != int(amount)):
                raise ValueError(f"custom.{name}: give a fraction of 1 or a whole number")
        return self

    @property
    def processes(self) -> int:
        """How many train one trial together, on one node."""
        return max(self.workers, int(self.gpus))

    def in_ray_s_words(self) -> dict[str, float]:
        """What a trial needs of its node, by the names that Ray has for it; memory in bytes."""
        wanted = {"CPU": float(self.cpus * self.processes), "GPU": self.gpus, **self.custom}
        if self.memory_gb is not None:
            wanted["memory"] = self.memory_gb * 1e9
        return {name: amount for name, amount in wanted.items() if amount}

    def key_of(self, name: str) -> str:
        """The setting behind one of Ray's resources."""
        several = "workers" if self.workers > 1 else "cpus"
        known = {"CPU": several, "GPU": "gpus", "memory": "memory_gb"}
        return known.get(name, f"custom.{name}")


class LimitsSection(Section):
    """When to stop.

    Attributes:
        hours: wall time of one `run`; running trials are then interrupted, to be resumed.
        samples: training samples in all; no trial starts once they are used up.
        trial_minutes: wall time of one attempt; a trial beyond it is killed, tried once more,
            then failed.
        max_failures: attempts of a trial whose process dies.
    """

    hours: float | None = Field(default=None, gt=0)
    samples: int | None = Field(default=None, ge=1)
    trial_minutes: float | None = Field(default=None, gt=0)
    max_failures: int = Field(default=3, ge=1)
