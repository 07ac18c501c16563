"""The front, compared with Optuna's, and its hypervolume, computed by hand."""

from __future__ import annotations

import random

import optuna
import pytest

from nipq_search.search.strategies.pareto import default_reference, hypervolume, non_dominated


def optuna_front(points, mode):
    direction = "maximize" if mode == "max" else "minimize"
    study = optuna.create_study(directions=[direction, "minimize"])
    for point in points.values():
        study.add_trial(optuna.trial.create_trial(values=list(point)))
    return {trial.number for trial in study.best_trials}


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("seed", range(8))
def test_the_front_equals_optunas_including_ties(mode, seed):
    generator = random.Random(seed)
    # Few distinct values produce many ties and equal points.
    points = {
        index: (generator.randrange(6) / 6, float(generator.randrange(1, 7)))
        for index in range(generator.randrange(1, 25))
    }
    assert non_dominated(points, mode) == optuna_front(points, mode)


def test_fronts_of_no_points_and_of_equal_points():
    assert non_dominated({}, "max") == set()
    assert non_dominated({3: (1.0, 2.0), 4: (1.0, 2.0), 5: (1.0, 3.0)}, "max") == {3, 4}


def volume(points, mode="max", **changes):
    options = {"axis": (4.0, 64.0), "reference": 0.5, "best": 0.9}
    return hypervolume(points, mode=mode, **options | changes)


def test_hypervolume_by_hand():
    # The log2 axis spans 2 to 6; heights are measured from 0.5 and divided by 0.4.
    assert volume([(0.9, 4.0)]) == pytest.approx(1.0)
    assert volume([(0.7, 16.0)]) == pytest.approx(2 * 0.2 / (4 * 0.4))
    points = [(0.8, 32.0), (0.6, 8.0)]
    assert volume(points) == pytest.approx((2 * 0.1 + 1 * 0.3) / 1.6)
    assert volume([]) == 0.0
    assert volume([(0.4, 8.0)]) == 0.0, "below the reference"
    assert volume([(1.0, 4.0)]) == pytest.approx(1.25), "better than the float model"


def test_hypervolume_of_points_outside_the_axis():
    assert volume([(0.9, 1.0)]) == pytest.approx(1.0)
    assert volume([(0.9, 64.0)]) == 0.0
    assert volume([(0.9, 100.0)]) == 0.0
    assert volume([(0.7, 16.0), (0.9, 100.0)]) == pytest.approx(0.25)


def test_hypervolume_of_a_metric_that_is_minimized():
    options = {"reference": 2.0, "best": 1.0, "mode": "min"}
    assert volume([(1.0, 4.0)], **options) == pytest.approx(1.0)
    assert volume([(1.5, 16.0)], **options) == pytest.approx(0.25)
    assert volume([(3.0, 4.0)], **options) == 0.0


def test_an_empty_rectangle_has_no_hypervolume():
    assert volume([(0.9, 4.0)], axis=(4.0, 4.0)) is None
    assert volume([(0.9, 4.0)], reference=0.9) is None
    assert volume([(0.9, 4.0)], reference=0.1, mode="min") is None


def test_default_reference():
    assert default_reference(0.9, "max") == pytest.approx(0.72)
    assert default_reference(0.8, "min") == pytest.approx(1.0)
    # The reference is worse than the float model's metric even if that is negative.
    assert default_reference(-1.2, "max") == pytest.approx(-1.44)
    assert default_reference(-3.0, "min") == pytest.approx(-2.25)
