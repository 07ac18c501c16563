"""Run sweeps under seeded failures of processes, nodes, drivers and servers.

    python benchmarks/storms.py --json benchmarks/results/storms.json --page docs/cluster.md

A storm is one such sweep, whose failures are determined by its seed. The test in
`tests/cluster/test_storms.py` runs a single storm. Seeds that have finished without a problem are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pages import write_table

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "search"), str(TESTS / "cluster")]

from postgres_server import Postgres  # noqa: E402
from storm import Storm  # noqa: E402

from nipq_search.file_io import write_json  # noqa: E402
from nipq_search.search.backend.tune import set_ray_defaults  # noqa: E402


def one(seed: int, postgres: Postgres) -> dict[str, Any]:
    """Run one storm on its own cluster and return its result; keep its files if it failed."""
    set_ray_defaults()
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="nipq-storm-"))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    began, problem, storm = time.monotonic(), "", None
    try:
        storm = Storm(folder, seed, cluster, postgres)
        storm.run()
        storm.check()
    except (AssertionError, OSError, RuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        (folder / "problem.txt").write_text(text)  # kept together with the sweep's files
        problem = f"{folder}: " + " ".join(text.split())[-300:]
    finally:
        if storm is not None:
            storm.close()
        cluster.shutdown()
        if not problem:
            shutil.rmtree(folder, ignore_errors=True)
    done = storm.done if storm is not None else []
    seconds = round(time.monotonic() - began)
    return {"seed": seed, "seconds": seconds, "actions": done, "problem": problem}


def table(found: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table with one row per storm."""
    lines = ["| seed | killed | seconds | outcome |", "|---|---|---|---|"]
    lines += [
        f"| {r['seed']} | {', '.join(r['actions'])} | {r['seconds']} | {r['problem'] or 'fine'} |"
        for r in sorted(found, key=lambda r: r["seed"])
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the storms without a good result; print the table, and write it to a given page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=Path, required=True, help="file of results, which is extended"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--page", type=Path, help="page whose table is updated")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else []
    postgres = Postgres()
    try:
        for seed in range(1, options.seeds + 1):
            if any(r["seed"] == seed and not r["problem"] for r in found):
                continue
            found = [r for r in found if r["seed"] != seed] + [one(seed, postgres)]
            write_json(options.json, found)
            print(found[-1], flush=True)
    finally:
        postgres.close()
    if options.page:
        write_table(options.page, "storms", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
