"""What the nodes of a cluster have, and whether trials can run there."""

from __future__ import annotations

import itertools
import logging
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nipq_search import storage
from nipq_search.errors import UserError
from nipq_search.search.config.plugins import plugin_mismatches
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.jobs import FACTS_FILE
from nipq_search.tasks import Task

_log = logging.getLogger("nipq_search")

_PATIENCE_SECONDS = 300.0
"""A node may have to make the environment of the sweep's code first."""

LAUNCHED = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's file on its head."""


def living() -> list[dict[str, Any]]:
    """Ray's description of every node that is alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def check_room(resources: ResourcesSection, grows: bool) -> None:
    """Check that some node, or one that the cluster can add, holds one trial.

    Args:
        resources: of one trial.
        grows: whether the cluster adds nodes.

    Raises:
        UserError: none does.
    """
    nodes = [node["Resources"] for node in living()]
    if not grows:
        _check_largest(resources, nodes, "node")
    elif (types := _node_types()) is not None:
        _check_largest(resources, [*nodes, *types], "type of node")
    elif not any(_holds(node, resources.in_ray_s_words()) for node in nodes):
        asked = ", ".join(f"{a:g} {n}" for n, a in resources.in_ray_s_words().items())
        _log.warning("no node holds a trial (%s) yet: waiting until the cluster adds one", asked)


def _node_types() -> list[Mapping[str, float]] | None:
    """Resources of the nodes that this head's cluster can add; None where that is not known."""
    try:
        known = yaml.safe_load(LAUNCHED.expanduser().read_text())["available_node_types"]
        types = [dict(kind["resources"]) for kind in known.values()]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    if not all("CPU" in kind for kind in types):  # nodes find out themselves what they have
        return None
    return [{"memory": math.inf, **kind} for kind in types]  # which need not be listed


def _holds(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _check_largest(
    resources: ResourcesSection, nodes: Sequence[Mapping[str, float]], word: str
) -> None:
    wanted = resources.in_ray_s_words()
    for name, amount in wanted.items():
        most = max((node.get(name, 0) for node in nodes), default=0)
        if amount > most:
            key = resources.key_of(name)
            unit = 1e9 if name == "memory" else 1
            raise UserError(
                f"resources.{key}: {amount / unit:g} asked for one trial, the largest {word} has "
                f"{most / unit:.4g}"
            )
    if not any(_holds(node, wanted) for node in nodes):
        asked = ", ".join(f"{a:g} {n}" for n, a in wanted.items())
        raise UserError(f"resources: no {word} has all of {asked}, which one trial asks for")


def slots(resources: ResourcesSection) -> int:
    """Trials that fit at once, node by node, or fewer where the configuration says so."""
    if resources.autoscale and resources.concurrent is not None:
        return resources.concurrent

    nodes = [node["Resources"] for node in living()]
    wanted = resources.in_ray_s_words()
    fits = sum(min(int(node.get(n, 0) / a) for n, a in wanted.items()) for node in nodes)
    fits = max(1, fits)
    return fits if resources.concurrent is None else min(fits, resources.concurrent)


def check_data(
    task: Task,
    batch_size: int,
    out: Path,
    resources: ResourcesSection,
    own_host: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Check that every node that may get a trial sees the sweep's folder, a batch and the model.

    Args:
        task: the sweep's; its data are loaded, or read later from files that each node must have.
        batch_size: of what is read.
        out: the sweep's folder.
        resources: of one trial.
        own_host: ask nodes on this host too, which has loaded the task already.
        stopping: whether somebody wants to wait no more, as with Ctrl-C.

    Raises:
        UserError: a node does not; names it and the fix.
    """
    import ray

    if nodes := _candidates(resources, own_host):
        known = storage.digest((out / FACTS_FILE).read_bytes())
        fix = "mount the same folders there, or take the node out"
        _check_each(nodes, _problem, (ray.put(task), batch_size, str(out), known), fix, stopping)


def check_plugins(
    plugins: Mapping[str, str],
    resources: ResourcesSection,
    own_host: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Check that every node that may get a trial has the sweep's plug-ins in the same versions.

    Args:
        plugins: `package version` by entry, as in `SweepConfig.plugins`.
        resources: resources of one trial.
        own_host: whether nodes on this host are checked as well.
        stopping: whether to stop waiting for answers, as after Ctrl-C.

    Raises:
        UserError: a node lacks a plug-in or has another version; names the node and the fix.
    """
    if plugins and (nodes := _candidates(resources, own_host)):
        fix = "install it there, or take the node out"
        _check_each(nodes, _plugin_problem, (dict(plugins),), fix, stopping)


def _plugin_problem(plugins: Mapping[str, str]) -> str | None:
    """Return what differs on a node from the driver's plug-ins; runs there."""
    return "; ".join(plugin_mismatches(plugins)) or None


def _candidates(resources: ResourcesSection, own_host: bool) -> list[dict[str, Any]]:
    """Return the nodes that may get a trial."""
    wanted = resources.in_ray_s_words()
    return [
        node
        for node in living()
        if _holds(node["Resources"], wanted)
        and (own_host or node["NodeManagerHostname"] != socket.gethostname())
    ]


def _check_each(
    nodes: Sequence[Mapping[str, Any]],
    problem_on: Callable[..., str | None],
    arguments: tuple[Any, ...],
    fix: str,
    stopping: Callable[[], bool],
) -> None:
    """Run a check on every node and raise `UserError` for the first problem that one returns."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(problem_on)
    asked = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": place, "max_retries": 0}
        asked[remote.options(**options).remote(*arguments)] = node
    left, limit = list(asked), time.monotonic() + _PATIENCE_SECONDS
    while left and time.monotonic() < limit:
        if stopping():
            return
        left = ray.wait(left, num_returns=len(left), timeout=1)[1]
    for answer, node in asked.items():
        try:
            problem = ray.get(answer, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problem = f"no answer within {_PATIENCE_SECONDS:.0f} s"
        except ray.exceptions.RayError:
            continue  # it has died meanwhile, or the trials will say
        if problem is not None:
            raise UserError(
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {problem}; "
                f"{fix}; `nipq-search doctor` asks them all"
            )


def _problem(task: Task, batch_size: int, out: str, known: str) -> str | None:
    """What keeps a trial from running on a node; runs there."""
    try:
        seen = storage.digest((Path(out) / FACTS_FILE).read_bytes())
    except OSError as error:
        return f"the sweep's folder {out} is not seen there ({error.strerror})"
    if seen != known:
        return f"the sweep's folder {out} is another one there"
    try:
        what = "data"
        list(itertools.islice(iter(task.loader("train", batch_size, 0)), 1))
        what = "model"
        task.build_model()  # it may read weights from a file
    except (OSError, UserError) as error:
        return f"the {what} cannot be read there ({' '.join(str(error).split())[:200]})"
    return None
