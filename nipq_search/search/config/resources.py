"""The sweep file's `resources` and `limits` sections."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of a sweep file, which is immutable and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class ResourcesSection(Section):
    """Resources of one trial.

    Attributes:
        cpus: CPU cores per process; also the number of torch threads.
        gpus: GPUs per trial. A fraction shares one GPU; with more than one, each GPU has its own
            data-parallel process.
        workers: number of data-parallel processes when training on CPUs.
        memory_gb: main memory that a trial reserves, in units of 1e9 bytes; this limits the number
            of concurrent trials per node.
        custom: amounts of Ray custom resources, for heterogeneous clusters.
        concurrent: maximum number of concurrent trials; by default, as many as fit on the cluster.
        autoscale: whether the cluster adds nodes while trials wait. All `concurrent` trials are
            then requested immediately, even if no node is available yet.
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
            raise ValueError(
                "concurrent: required with `autoscale`; set the number of trials to add nodes for"
            )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError("gpus: values above 1 must be whole numbers")
        if self.workers > 1 and self.gpus:
            raise ValueError("workers: only for CPUs; with `gpus`, each GPU has its own process")
        for name, amount in self.custom.items():
            if name.lower() in ("cpu", "gpu", "memory", "object_store_memory"):
                raise ValueError(f"custom.{name}: use the dedicated key instead")
            if not 0 < amount < math.inf or (amount > 1 and amount != int(amount)):
                raise ValueError(f"custom.{name}: give a fraction below 1 or a whole number")
        return self

    @property
    def processes(self) -> int:
        """Number of processes that train one trial together on one node."""
        return max(self.workers, int(self.gpus))

    def ray_resources(self) -> dict[str, float]:
        """Return the resources that a trial needs, by Ray's resource names; memory in bytes."""
        wanted = {"CPU": float(self.cpus * self.processes), "GPU": self.gpus, **self.custom}
        if self.memory_gb is not None:
            wanted["memory"] = self.memory_gb * 1e9
        return {name: amount for name, amount in wanted.items() if amount}

    def key_of(self, name: str) -> str:
        """Return the key of this section that sets a Ray resource, for messages.

        Two keys determine `CPU`; the result is `workers` if it is above 1, and `cpus` otherwise.
        """
        several = "workers" if self.workers > 1 else "cpus"
        known = {"CPU": several, "GPU": "gpus", "memory": "memory_gb"}
        return known.get(name, f"custom.{name}")


class LimitsSection(Section):
    """Limits of a sweep.

    Attributes:
        hours: maximum wall time of one `run`, in hours; when it is reached, running trials are
            interrupted and can be resumed.
        samples: total number of training samples; once it is reached, no further trial starts.
        trial_minutes: maximum wall time of one attempt of a trial or baseline, in minutes. An
            attempt that exceeds it is killed and retried once; if the limit is exceeded again, the
            trial or baseline is marked as failed.
        max_failures: a job fails when its process has died this many times in one run.
    """

    hours: float | None = Field(default=None, gt=0)
    samples: int | None = Field(default=None, ge=1)
    trial_minutes: float | None = Field(default=None, gt=0)
    max_failures: int = Field(default=3, ge=1)
