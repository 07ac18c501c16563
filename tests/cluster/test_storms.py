"""A sweep on several nodes with PostgreSQL and MLflow's server, under seeded faults.

`make test-all` runs twenty of them: `benchmarks/storms.py`.
"""

from __future__ import annotations

import pytest
from storm import Storm

SEED = 9
"""A short storm that kills every kind of process; odd seeds set the URL in the environment."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_sweep_does_not_notice(tmp_path, cluster, postgres, monkeypatch):
    monkeypatch.delenv("NIPQ_TEST_WARM_SERVER")  # the nodes' processes start as they do for users
    storm = Storm(tmp_path, SEED, cluster, postgres)
    try:
        storm.run()
        storm.check()
    finally:
        storm.close()
