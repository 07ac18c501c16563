"""A sweep on several nodes with PostgreSQL and MLflow's server, through three seeded storms."""

from __future__ import annotations

import pytest
from storm import Storm

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_sweep_does_not_notice(seed, tmp_path, cluster, postgres):
    storm = Storm(tmp_path, seed, cluster, postgres)
    try:
        storm.run()
        storm.check()
    finally:
        storm.close()
