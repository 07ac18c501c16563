"""What `doctor` asks of every node of a cluster: versions, data, shared folder, devices."""

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
from nipq_search.search.backend.tune import ray_cluster
from nipq_search.search.config.plugins import plugin_mismatches
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.config.sweep_config import SweepConfig

SAME = ("torch", "ray", "numpy", "scipy")
"""Packages whose versions must agree: results, and what Ray sends, depend on them."""

_PATIENCE_SECONDS = 120.0


def look(
    folder: str,
    token: str,
    task: str | None,
    arguments: Mapping[str, Any],
    home: str | None = None,
    plugins: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a node sees; runs there.

    Args:
        folder: the shared folder.
        token: name of a file in it that the driver wrote; the node writes one beside it.
        task: of the sweep whose data are looked at, or None.
        arguments: `task_args`.
        home: URI for models and checkpoints, or None.
        plugins: `package version` of the sweep's plug-ins, by entry.
    """
    import torch

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in SAME},
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
            blobs.probe(home)
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
    """What is wrong with a node, each with its fix.

    Args:
        node: what `look` found there.
        own: what it found here, where the sweep would be started.
        folder: the shared folder.
    """
    wrong = []
    if node["python"].rpartition(".")[0] != own["python"].rpartition(".")[0]:
        wrong.append(f"Python {node['python']}, here {own['python']}: install the same")
    for name in SAME:
        there, here = node["versions"].get(name), own["versions"].get(name)
        if there != here:
            wrong.append(f"{name} {there}, here {here}: install the same")
    wrong += node["plugins"]
    if not node["read"]:
        reason = f" ({node['error']})" if node.get("error") else ""
        wrong.append(f"does not see {folder} as this machine does{reason}: mount it there")
    if "store_error" in node:
        wrong.append(f"checkpoints: {node['store_error']}")
    if "data_error" in node:
        wrong.append(f"the data: {node['data_error']}")
    elif node["data"] != own["data"]:
        wrong.append("its data differ from those here: copy them, or mount one folder")
    return wrong


def check_nodes(address: str, folder: Path, config: SweepConfig | None) -> list[dict[str, Any]]:
    """A check per node, as `doctor` has them.

    Args:
        address: of the cluster, `auto` or HOST:PORT.
        folder: where sweeps are to be written; it must be there.
        config: a sweep whose data every node must have, or None.

    Raises:
        UserError: no cluster answers, or the folder cannot be written here.
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
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        own = look(str(folder), token, task, arguments)
        with ray_cluster(address, ResourcesSection(cpus=1), code, check=False):
            asked = (str(folder), token, task, arguments, home, plugins)
            return [_check(node, folder, own, asked) for node in _living()]
    finally:
        for file in folder.glob(f"{token}*"):
            file.unlink(missing_ok=True)


def _living() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _check(
    node: Mapping[str, Any], folder: Path, own: Mapping[str, Any], asked: tuple[Any, ...]
) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"node {node['NodeManagerAddress']}"
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    remote: Any = ray.remote(look)
    remote = remote.options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    token = asked[1]
    before = len(list(folder.glob(f"{token}-*")))
    try:
        found = ray.get(remote.remote(*asked), timeout=_PATIENCE_SECONDS)
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return {"check": name, "ok": False, "detail": detail, "fix": "see the node's Ray log"}
    wrong = differences(found, own, str(folder))
    if found["read"] and len(list(folder.glob(f"{token}-*"))) == before:
        wrong.append(f"what it writes into {folder} is not seen here: mount one folder")
    resources = node["Resources"]
    detail = f"{found['host']}: {resources.get('CPU', 0):g} CPUs, {len(found['gpus'])} GPUs, "
    detail += f"{resources.get('memory', 0) / 1e9:.0f} GB"
    return {"check": name, "ok": not wrong, "detail": detail, "fix": "; ".join(wrong) or None}
