"""The cost at which the next trial is expected to improve the front most."""

from __future__ import annotations

import math

import pytest

from nipq_search.search.strategies import expected_gain
from nipq_search.search.strategies.expected_gain import SAME, Axes

AXES = Axes(cost="bops", least=64.0, most=1024.0, reference=0.7, best=0.9)


def most_promising_cost(points, running, asked, axes, within=(64.0, 1024.0)):
    """Call the library's function, by default with the whole axis in range."""
    return expected_gain.most_promising_cost(points, running, asked, axes, within)


def often(points):
    """Repeat each point four times, so that a further trial there has little expected gain."""
    return [point for point in points for _ in range(4)]


def test_a_steep_wide_gap_is_filled_in_its_middle():
    points = [(0.80, 64.0), (0.89, 256.0), (0.895, 512.0), (0.9, 1024.0)]
    assert most_promising_cost(often(points), [], [], AXES) == pytest.approx(128.0)


def test_a_running_trial_is_not_repeated():
    points = [(0.80, 64.0), (0.89, 256.0), (0.895, 512.0), (0.9, 1024.0)]
    second = most_promising_cost(often(points), [128.0], [], AXES)
    assert abs(math.log2(second / 128.0)) > SAME


def test_the_ends_of_the_front_count_as_gaps():
    assert 64.0 < most_promising_cost(often([(0.89, 512.0)]), [], [], AXES) < 512.0
    assert 128.0 < most_promising_cost(often([(0.72, 64.0), (0.75, 128.0)]), [], [], AXES) < 1024.0


def test_without_gaps_the_widest_part_of_the_front_is_repeated():
    points = [(0.88, 64.0), (0.881, 66.0), (0.8815, 68.0), (0.882, 70.0)]
    flat = Axes(cost="bops", least=64.0, most=1024.0, reference=0.7, best=0.882)
    assert most_promising_cost(points, [], [], flat) == pytest.approx(70.0)
    # Each repeat is expected to gain half as much as the one before.
    again = [*points, *[(0.8815, 70.0)] * 12]
    assert most_promising_cost(again, [], [], flat) < 70.0


def test_dominated_points_are_not_on_the_front():
    points = [(0.80, 64.0), (0.89, 256.0), (0.60, 128.0), (0.9, 1024.0)]
    assert 64.0 < most_promising_cost(often(points), [], [], AXES) < 256.0


def test_a_front_better_than_the_float_model_has_no_room_above():
    assert most_promising_cost([(0.95, 64.0)], [], [], AXES) == pytest.approx(64.0)


def test_an_unreachable_place_is_not_requested_forever():
    """No trial reaches the requested cost, because it is unreachable or every trial fails."""
    points = often([(0.80, 64.0), (0.89, 256.0), (0.895, 512.0), (0.9, 1024.0)])
    asked, places = [cost for _, cost in points], []
    for _ in range(6):
        places.append(most_promising_cost(points, [], [*asked, *places], AXES))
    assert max(places.count(place) for place in places) <= 3


@pytest.mark.parametrize("front", [[(0.89, 128.0)], [(0.72, 64.0), (0.89, 512.0)]])
def test_concurrent_workers_get_different_places(front):
    running = []
    for _ in range(4):
        running.append(most_promising_cost(front, running, running, AXES))
    distances = [abs(math.log2(a / b)) for i, a in enumerate(running) for b in running[:i]]
    assert min(distances) > SAME


def test_a_repeat_returns_the_exact_cost():
    """The exact cost is returned: `2 ** log2(cost)` may round down to an unreachable cost."""
    for least in range(64, 90):
        axes = Axes(cost="bops", least=float(least), most=1024.0, reference=0.7, best=0.9)
        points = [(0.5, float(least)), (0.9, least + 1.0)]
        assert most_promising_cost(points, [], [], axes, (float(least), 1024.0)) >= least


def test_thousands_of_trials_at_one_place_do_not_overflow():
    points = [(0.88, 64.0), (0.89, 128.0)]
    costs = [math.sqrt(64.0 * 128.0)] * 3000 + [64.0] * 3000
    found = most_promising_cost(points * 2000, costs[:2000], costs, AXES)
    assert AXES.least <= found <= AXES.most


def test_the_cost_stays_within_the_given_range():
    front = [(0.72, 100.0), (0.89, 512.0)]
    for within in [(100.0, 512.0), (100.0, 100.0), (512.0, 512.0), (200.0, 300.0)]:
        asked, running = [], []
        for number in range(12):
            place = most_promising_cost(front, running, asked, AXES, within)
            assert within[0] * 2**-SAME <= place <= within[1]
            asked.append(place)
            running = asked[-(number % 3) :]


def test_a_collapsed_trial_attracts_no_more_trials_than_one_at_the_reference():
    """Use a metric that has no worst value, such as perplexity."""
    axes = Axes(cost="bops", least=4.0, most=32.0, reference=-25.0, best=-20.0)

    def places(collapsed):
        points, asked = [(-20.5, 16.0), (-22.0, 9.0), (collapsed, 4.0)], [16.0, 9.0, 4.0]
        for _ in range(20):
            place = most_promising_cost(points, [], asked, axes, (4.0, 16.0))
            asked.append(place)
            points.append((collapsed if place < 4.5 else -20.0 - 8.0 / place, place))
        return asked

    assert places(-1e3) == places(-1e300) == places(-25.0)
