"""The nodes of a cluster: their resources, and checks that trials can run on them."""

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

from nipq_search import file_io
from nipq_search.errors import UserError
from nipq_search.search.config.plugins import plugin_mismatches
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.jobs import FACTS_FILE
from nipq_search.tasks import Task

_log = logging.getLogger("nipq_search")

_NODE_TIMEOUT_SECONDS = 300.0
"""Time limit for a check on a node, which may first have to create its runtime environment."""

BOOTSTRAP_FILE = Path("~/ray_bootstrap_config.yaml")
"""Path of the cluster configuration that `ray up` stores on the head node."""


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of every node that is alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def check_trial_fits(resources: ResourcesSection, grows: bool) -> None:
    """Check that one trial fits on an existing node, or on one that the cluster can add.

    If it is unknown which types of nodes the cluster can add, log a warning instead of raising.

    Args:
        resources: resources of one trial.
        grows: whether the cluster can add nodes.

    Raises:
        UserError: no node is large enough.
    """
    nodes = [node["Resources"] for node in alive_nodes()]
    if not grows:
        _check_largest(resources, nodes, "node")
    elif (types := _node_types()) is not None:
        _check_largest(resources, [*nodes, *types], "node type")
    elif not any(_holds(node, resources.ray_resources()) for node in nodes):
        request = ", ".join(f"{a:g} {n}" for n, a in resources.ray_resources().items())
        _log.warning(
            "no node is large enough for a trial (%s): waiting for the cluster to add one", request
        )


def _node_types() -> list[Mapping[str, float]] | None:
    """Return the resources of the node types that the cluster can add; None if unknown."""
    try:
        known = yaml.safe_load(BOOTSTRAP_FILE.expanduser().read_text())["available_node_types"]
        types = [dict(kind["resources"]) for kind in known.values()]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    if not all("CPU" in kind for kind in types):  # the nodes then detect their own CPUs
        return None
    return [{"memory": math.inf, **kind} for kind in types]  # memory is optional in the file


def _holds(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _check_largest(
    resources: ResourcesSection, nodes: Sequence[Mapping[str, float]], word: str
) -> None:
    """Raise `UserError` if no entry of `nodes` is large enough; `word` describes an entry."""
    wanted = resources.ray_resources()
    for name, amount in wanted.items():
        most = max((node.get(name, 0) for node in nodes), default=0)
        if amount > most:
            key = resources.key_of(name)
            unit = 1e9 if name == "memory" else 1
            raise UserError(
                f"resources.{key}: one trial requests {amount / unit:g}, but the largest {word} "
                f"has {most / unit:.4g}"
            )
    if not any(_holds(node, wanted) for node in nodes):
        request = ", ".join(f"{a:g} {n}" for n, a in wanted.items())
        raise UserError(f"resources: one trial requests {request}; no {word} has all of them")


def slots(resources: ResourcesSection) -> int:
    """Return how many trials run concurrently: as many as fit, but at most `concurrent`.

    The result is at least 1. If `autoscale` and `concurrent` are set, the result is `concurrent`
    itself, because the number of trials that fit changes with the number of nodes.
    """
    if resources.autoscale and resources.concurrent is not None:
        return resources.concurrent

    nodes = [node["Resources"] for node in alive_nodes()]
    wanted = resources.ray_resources()
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
    """Check that every node large enough for a trial can access the sweep's folder and the task.

    Each node reads a batch of the training split and builds the model.

    Args:
        task: the sweep's task; its data are already loaded, or are read from files on each node.
        batch_size: number of samples in the batch that is read.
        out: the sweep's folder.
        resources: resources of one trial.
        own_host: whether to also check nodes on this host, where the task is already loaded.
        stopping: returns whether to abandon the check without an error, for example after Ctrl-C.

    Raises:
        UserError: a check failed on a node; the message names the node and the fix.
    """
    import ray

    if nodes := _candidates(resources, own_host):
        facts_digest = file_io.digest((out / FACTS_FILE).read_bytes())
        arguments = (ray.put(task), batch_size, str(out), facts_digest)
        fix = "mount the same folders there, or remove the node"
        _check_each(nodes, _node_problem, arguments, fix, stopping)


def check_plugins(
    plugins: Mapping[str, str],
    resources: ResourcesSection,
    own_host: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Check that every node large enough for a trial has the driver's versions of the plug-ins.

    Args:
        plugins: the sweep's plug-ins, as `package version` by entry; see `SweepConfig.plugins`.
        resources: resources of one trial.
        own_host: whether to also check nodes on this host.
        stopping: returns whether to abandon the check without an error, for example after Ctrl-C.

    Raises:
        UserError: a plug-in is missing or has a different version; the message names the node
            and the fix.
    """
    if plugins and (nodes := _candidates(resources, own_host)):
        fix = "install it there, or remove the node"
        _check_each(nodes, _plugin_problem, (dict(plugins),), fix, stopping)


def _plugin_problem(plugins: Mapping[str, str]) -> str | None:
    """Return how a node's plug-ins differ from the driver's, or None; runs on that node."""
    return "; ".join(plugin_mismatches(plugins)) or None


def _candidates(resources: ResourcesSection, own_host: bool) -> list[dict[str, Any]]:
    """Return the nodes that are large enough for a trial; include this host only if `own_host`."""
    wanted = resources.ray_resources()
    return [
        node
        for node in alive_nodes()
        if _holds(node["Resources"], wanted)
        and (own_host or node["NodeManagerHostname"] != socket.gethostname())
    ]


def _check_each(
    nodes: Sequence[Mapping[str, Any]],
    find_problem: Callable[..., str | None],
    arguments: tuple[Any, ...],
    fix: str,
    stopping: Callable[[], bool],
) -> None:
    """Run a check on every node and raise `UserError` for the first problem found.

    Args:
        nodes: the nodes, as Ray describes them.
        find_problem: the check, which returns the problem of the node that it runs on, or None.
        arguments: arguments of the check.
        fix: how to fix any problem that the check finds.
        stopping: returns whether to abandon the check without an error.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(find_problem)
    answers = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": place, "max_retries": 0}
        answers[remote.options(**options).remote(*arguments)] = node
    left, limit = list(answers), time.monotonic() + _NODE_TIMEOUT_SECONDS
    while left and time.monotonic() < limit:
        if stopping():
            return
        left = ray.wait(left, num_returns=len(left), timeout=1)[1]
    for answer, node in answers.items():
        try:
            problem = ray.get(answer, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problem = f"no response within {_NODE_TIMEOUT_SECONDS:.0f} s"
        except ray.exceptions.RayError:
            continue  # the node died meanwhile, or its trials will report the error
        if problem is not None:
            raise UserError(
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {problem}; "
                f"{fix}; `nipq-search doctor` checks all nodes"
            )


def _node_problem(task: Task, batch_size: int, out: str, facts_digest: str) -> str | None:
    """Return why a node cannot use the sweep's folder, data or model, or None; runs on it."""
    try:
        found = file_io.digest((Path(out) / FACTS_FILE).read_bytes())
    except OSError as error:
        return f"the sweep's folder {out} is not visible there ({error.strerror})"
    if found != facts_digest:
        return f"the sweep's folder {out} is a different folder there"
    try:
        what = "data"
        list(itertools.islice(iter(task.loader("train", batch_size, 0)), 1))
        what = "model"
        task.build_model()  # it may read weights from a file
    except (OSError, UserError) as error:
        return f"the {what} cannot be read there ({' '.join(str(error).split())[:200]})"
    return None
