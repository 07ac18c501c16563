"""The check that `doctor` runs on every node of a cluster: versions, shared folder and data."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nipq_search import blobs
from nipq_search.errors import UserError
from nipq_search.search.backend.code_shipping import sources
from nipq_search.search.backend.nodes import alive_nodes
from nipq_search.search.backend.tune import ray_cluster
from nipq_search.search.config.plugins import plugin_mismatches
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.config.sweep_config import SweepConfig

SAME_VERSION = ("torch", "ray", "numpy", "scipy")
"""Packages whose versions must match: results and Ray's serialization depend on them."""

_NODE_TIMEOUT_SECONDS = 120.0


def inspect_node(
    folder: str,
    token: str,
    task: str | None,
    arguments: Mapping[str, Any],
    home: str | None = None,
    plugins: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Inspect the machine that this function runs on.

    Args:
        folder: the shared folder.
        token: name and content of a file that `check_nodes` wrote to this folder; this function
            adds another file, to show that the node can write to the folder.
        task: the task whose data are loaded, or None.
        arguments: keyword arguments of the task.
        home: URI of the storage for models and checkpoints, or None; the function writes an
            object, reads it and deletes it.
        plugins: `package version` of the sweep's plug-ins, by entry.

    Returns:
        `host`, `python`, `versions` by package, `gpus`, `data` (a digest, or None), `plugins` (how
        the plug-ins differ), and `read` (whether the folder can be used). `error`, `store_error`
        and `data_error` are messages, set only if the folder, the storage or the data failed.
    """
    import torch

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in SAME_VERSION},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "data": None,
        "plugins": plugin_mismatches(plugins),
    }
    try:
        found["read"] = (Path(folder) / token).read_text() == token
        (Path(folder) / f"{token}-{uuid.uuid4().hex}").write_text(found["host"])
    except OSError as error:
        found["read"], found["error"] = False, str(error)
    try:
        if home is not None:
            blobs.check_store(home)
    except (OSError, UserError) as error:
        found["store_error"] = " ".join(str(error).split())[:200]
    if task is not None:
        from nipq_search.tasks import make_task
        from nipq_search.tasks.base import dataset, load_data

        try:
            built = make_task(task, arguments)
            load_data(built)
            found["data"] = dataset(built)["digest"]
        except UserError as error:
            found["data_error"] = str(error)
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def differences(node: Mapping[str, Any], own: Mapping[str, Any], folder: str) -> list[str]:
    """List the problems of a node, most of them with a fix.

    Args:
        node: result of `inspect_node` on the node.
        own: result of `inspect_node` on this machine, where the driver would run.
        folder: the shared folder.

    Returns:
        One message per problem.
    """
    wrong = []
    if node["python"].rpartition(".")[0] != own["python"].rpartition(".")[0]:
        wrong.append(f"Python {node['python']}, here {own['python']}: install the same version")
    for name in SAME_VERSION:
        there, here = node["versions"].get(name), own["versions"].get(name)
        if there != here:
            wrong.append(f"{name} {there}, here {here}: install the same version")
    wrong += node["plugins"]
    if not node["read"]:
        reason = f" ({node['error']})" if node.get("error") else ""
        wrong.append(f"{folder} is not the same folder as on this machine{reason}: mount it there")
    if "store_error" in node:
        wrong.append(f"checkpoints: {node['store_error']}")
    if "data_error" in node:
        wrong.append(f"the data: {node['data_error']}")
    elif node["data"] != own["data"]:
        wrong.append("its data differ from the data here: copy them, or mount a shared folder")
    return wrong


def check_nodes(address: str, folder: Path, config: SweepConfig | None) -> list[dict[str, Any]]:
    """Check every node of a cluster.

    Args:
        address: address of the cluster, `auto` or HOST:PORT.
        folder: existing folder for sweeps, which all nodes must share.
        config: a sweep configuration whose data every node must have, or None.

    Returns:
        One result per node, in the format of `doctor`.

    Raises:
        UserError: no cluster is reachable, or the folder is not writable on this machine.
    """
    task = None if config is None else config.task
    arguments = {} if config is None else dict(config.task_args)
    home = None if config is None else config.checkpoints
    plugins = {} if config is None else config.with_plugins().plugins
    code = sources(task or "")
    token = f".doctor-{uuid.uuid4().hex}"
    try:
        (folder / token).write_text(token)
    except OSError as error:
        raise UserError(f"{folder}: not writable ({error.strerror})") from error
    try:
        own = inspect_node(str(folder), token, task, arguments)
        with ray_cluster(address, ResourcesSection(cpus=1), code, check=False):
            arguments_there = (str(folder), token, task, arguments, home, plugins)
            return [_check(node, folder, own, arguments_there) for node in alive_nodes()]
    finally:
        for file in folder.glob(f"{token}*"):
            file.unlink(missing_ok=True)


def _check(
    node: Mapping[str, Any], folder: Path, own: Mapping[str, Any], arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Run `inspect_node(*arguments)` on a node and compare its result with `own`.

    Returns:
        The result of the check, in the format of `doctor`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"node {node['NodeManagerAddress']}"
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    remote: Any = ray.remote(inspect_node)
    remote = remote.options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    token = arguments[1]
    before = len(list(folder.glob(f"{token}-*")))
    try:
        found = ray.get(remote.remote(*arguments), timeout=_NODE_TIMEOUT_SECONDS)
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return {"check": name, "ok": False, "detail": detail, "fix": "see the node's Ray log"}
    wrong = differences(found, own, str(folder))
    if found["read"] and len(list(folder.glob(f"{token}-*"))) == before:
        wrong.append(f"its files in {folder} are not visible here: mount a shared folder")
    resources = node["Resources"]
    detail = f"{found['host']}: {resources.get('CPU', 0):g} CPUs, {len(found['gpus'])} GPUs, "
    detail += f"{resources.get('memory', 0) / 1e9:.0f} GB"
    return {"check": name, "ok": not wrong, "detail": detail, "fix": "; ".join(wrong) or None}
