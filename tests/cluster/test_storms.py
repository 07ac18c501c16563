"""A sweep on several nodes with PostgreSQL and MLflow's server, under seeded faults.

`make test-all` runs twenty such storms with `benchmarks/storms.py`, where the processes of the
nodes start as they do for users. Here they are forked; only the command starts as for a user.
"""

from __future__ import annotations

import pytest
from storm import Storm

SEED = 9
"""With this seed, a short storm kills every kind of process.

Odd seeds pass the storage URL in the environment."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_sweep_does_not_notice(tmp_path, cluster, postgres):
    storm = Storm(tmp_path, SEED, cluster, postgres)
    try:
        storm.run()
        storm.check()
    finally:
        storm.close()
