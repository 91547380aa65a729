"""The way to a target in several steps."""

import itertools

import numpy as np
import pytest
from woodfisher_jax.recompute import degree_of, levels


def test_linear_levels_are_evenly_spaced_and_end_at_the_target() -> None:
    np.testing.assert_allclose(levels(0.2, 0.98, 2, 1.0), [0.46, 0.72, 0.98])
    assert levels(0.0, 0.1 + 0.2, 3, 1.0)[-1] == 0.1 + 0.2


def test_levels_follow_the_original_s_formula() -> None:
    start, target, number, degree = 0.0, 0.9, 4, 3.0
    expected = [
        start + (target - start) * (1 - (1 - min((i + 1) / (number + 1), 1)) ** degree)
        for i in range(number + 1)
    ]
    np.testing.assert_allclose(levels(start, target, number, degree), expected)


def test_they_may_fall_as_macs_do() -> None:
    found = levels(40.6, 10.0, 5, 3.0)
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[0] - found[1] > found[-2] - found[-1]


def test_exponential_levels_leave_the_same_share_at_each() -> None:
    found = levels(0.2, 0.9, 4, None)
    left = 1 - np.array([0.2, *found])
    np.testing.assert_allclose(left[1:] / left[:-1], (0.1 / 0.8) ** (1 / 5))
    assert found[-1] == 0.9
    # Of MACs what is left is the level itself.
    macs = np.array([40.0, *levels(40.0, 10.0, 1, None, limit=0.0)])
    np.testing.assert_allclose(macs, [40.0, 20.0, 10.0])


def test_without_recomputations_there_is_one_step() -> None:
    assert levels(0.3, 0.8, 0, 1.0) == [0.8]


def test_degrees_by_name() -> None:
    assert degree_of("linear", None) == 1.0
    assert degree_of("poly", None) == 3.0
    assert degree_of("poly", 2) == 2.0
    assert degree_of("exponential", None) is None


@pytest.mark.parametrize(
    ("schedule", "degree", "message"),
    [
        ("cubic", None, "recompute_schedule='cubic'.*linear.*poly"),
        ("linear", 2.0, "recompute_degree=2.0 makes no sense"),
        ("exponential", 2.0, "recompute_degree=2.0.*'exponential'"),
        ("poly", 0.0, "recompute_degree=0.0; expected a positive"),
        ("poly", float("inf"), "recompute_degree=inf"),
    ],
)
def test_errors(schedule, degree, message) -> None:
    with pytest.raises(ValueError, match=message):
        degree_of(schedule, degree)
