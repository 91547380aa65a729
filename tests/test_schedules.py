"""Sparsity levels: the published tables, both ends, and never a step back."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.schedules import gradual, levels, one_shot, polynomial_sparsity

# Levels computed from the original's code (five digits), its own last step last.
RESNET50_EPOCHS = [1, 6, 11, 16, 21, 26, 31, 36]
PUBLISHED = [
    (
        (1, 40, 5, 0.05, 0.80),
        RESNET50_EPOCHS,
        [0.05, 0.30306, 0.49164, 0.62522, 0.71328, 0.76531, 0.79078, 0.799191],
    ),
    (
        (1, 40, 5, 0.05, 0.90),
        RESNET50_EPOCHS,
        [0.05, 0.33680, 0.55052, 0.70191, 0.80172, 0.86068, 0.88955, 0.899083],
    ),
    (
        (1, 40, 5, 0.05, 0.98),
        RESNET50_EPOCHS,
        [0.05, 0.36379, 0.59763, 0.76327, 0.87247, 0.93698, 0.96857, 0.978997],
    ),
    (
        (4, 24, 4, 0.05, 0.89),
        [4, 8, 12, 16, 20, 24],
        [0.05, 0.45992, 0.70856, 0.83624, 0.88328, 0.89],
    ),
    (
        (4, 24, 4, 0.05, 0.7528),
        [4, 8, 12, 16, 20, 24],
        [0.05, 0.39297, 0.60100, 0.70782, 0.74718, 0.7528],
    ),
]

fractions = st.floats(0, 0.99)
degrees = st.floats(0.5, 5)


@st.composite
def plans(draw):
    start = draw(st.integers(0, 50))
    end = start + draw(st.integers(0, 50))
    initial, target = sorted((draw(fractions), draw(fractions)))
    return start, end, draw(st.integers(1, 20)), initial, target, draw(degrees)


@pytest.mark.parametrize(("plan", "epochs", "expected"), PUBLISHED)
def test_levels_are_those_of_the_original_and_end_at_the_target(
    plan, epochs, expected
) -> None:
    stages = gradual(*plan)
    assert [stage.time for stage in stages[: len(epochs)]] == epochs
    found = [stage.sparsity for stage in stages[: len(epochs)]]
    assert found == pytest.approx(expected, abs=6e-6)
    assert stages[-1] == (plan[1], plan[4])


def test_a_schedule_from_zero_begins_one_period_later() -> None:
    stages = gradual(0, 22, 2, 0.0, 0.9)
    assert [stage.time for stage in stages] == list(range(2, 23, 2))
    found = [stage.sparsity for stage in stages]
    expected = [0.22382, 0.40706, 0.55379]
    assert found[:3] == pytest.approx(expected, abs=6e-6)
    assert found[-2:] == pytest.approx([0.89932, 0.9], abs=6e-6)


def test_one_shot_is_one_stage_at_its_target() -> None:
    assert one_shot(0.95) == ((0, 0.95),)
    assert one_shot(0.9, time=7) == ((7, 0.9),)


def test_degree_one_is_a_straight_line() -> None:
    found = [polynomial_sparsity(t, 10, 20, 0.2, 0.8, 1) for t in (10, 12.5, 15, 20)]
    assert found == pytest.approx([0.2, 0.35, 0.5, 0.8])


def test_the_published_formula_with_degree_three() -> None:
    expected = 0.9 + (0.1 - 0.9) * (1 - (7 - 3) / (13 - 3)) ** 3
    assert polynomial_sparsity(7, 3, 13, 0.1, 0.9) == pytest.approx(expected)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plans(), st.integers(-10, 200))
def test_the_level_is_clipped_to_its_two_ends(plan, time) -> None:
    start, end, _, initial, target, degree = plan
    level = polynomial_sparsity(time, start, end, initial, target, degree)
    assert initial - 1e-12 <= level <= target + 1e-12
    if time >= end:
        assert level == target
    elif time <= start:
        assert level == pytest.approx(initial, abs=1e-12)


@pytest.mark.parametrize(("time", "level"), [(4, 0.1), (5, 0.9), (6, 0.9)])
def test_with_equal_ends_the_target_holds_from_there_on(time, level) -> None:
    assert polynomial_sparsity(time, 5, 5, 0.1, 0.9) == level


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plans())
def test_stages_rise_in_time_and_never_fall_in_sparsity(plan) -> None:
    start, end, frequency, initial, target, _ = plan
    stages = gradual(*plan)
    times = [stage.time for stage in stages]
    found = [stage.sparsity for stage in stages]
    assert times == sorted(set(times))
    # Rounding in the formula may undercut the level before by an ulp.
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(found))
    assert all(0 < level < 1 for level in found)
    assert all(t == end or (t - start) % frequency == 0 for t in times)
    if target > 0:
        assert stages[-1] == (end, target)
    if initial > 1e-9:
        assert times[0] == start


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((0, 4, 0, 0.1, 0.9), ["frequency=0", "1 or more"]),
        ((5, 4, 1, 0.1, 0.9), ["start=5", "end=4", "start <= end"]),
        ((-1, 4, 1, 0.1, 0.9), ["start=-1", "0 <= start"]),
        ((0, 4, 1, 0.95, 0.9), ["initial=0.95", "target=0.9", "initial <= target"]),
        ((0, 4, 1, 0.1, 1.0), ["target=1.0", "below 1"]),
        ((0, 4, 1, -0.1, 0.9), ["initial=-0.1", "from 0"]),
        ((0, 4, 1, 0.1, 90), ["target=90; expected a fraction", "mean 0.9?"]),
        ((0, 4, 1, "10%", 0.9), ["initial='10%'; expected", "mean 0.1?"]),
        ((0, 4, 1, float("nan"), 0.9), ["initial=nan"]),
        ((0, 4, 1, 0.1, 0.9, 0), ["degree=0", "positive"]),
        ((0, 4, 1, 0.1, 0.9, float("nan")), ["degree=nan", "positive"]),
    ],
)
def test_arguments_out_of_range_are_named(arguments, parts) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        gradual(*arguments)
    for part in parts:
        assert part in str(caught.value)


# ------------------------------------------------------------ the way to one target


def test_numbers_of_jax_and_numpy_make_the_same_schedule() -> None:
    expected = gradual(0, 8, 4, 0.25, 0.5, 3.0)
    for kind in (np.asarray, jnp.asarray):
        given = map(kind, (0, 8, 4, 0.25, 0.5, 3.0))
        found = gradual(*given)
        assert found == expected
        assert {type(stage.time) for stage in found} == {int}


def test_linear_levels_are_evenly_spaced_and_end_at_the_target() -> None:
    np.testing.assert_allclose(levels(0.2, 0.98, 2, 1.0), [0.46, 0.72, 0.98])
    assert levels(0.0, 0.1 + 0.2, 3, 1.0)[-1] == 0.1 + 0.2
    assert levels(0.3, 0.8, 0, 1.0) == [0.8]


def test_levels_with_a_degree_are_those_of_the_polynomial_schedule() -> None:
    expected = [polynomial_sparsity(i, 0, 5, 0.1, 0.9, 3.0) for i in range(1, 6)]
    np.testing.assert_allclose(levels(0.1, 0.9, 4, 3.0), expected)
    macs = levels(40.6, 10.0, 5, 3.0)  # of MACs they fall
    assert (np.diff(macs) < 0).all()
    assert macs[0] - macs[1] > macs[-2] - macs[-1]


def test_exponential_levels_leave_the_same_share_at_each() -> None:
    found = levels(0.2, 0.9, 4, None)
    left = 1 - np.array([0.2, *found])
    np.testing.assert_allclose(left[1:] / left[:-1], (0.1 / 0.8) ** (1 / 5))
    assert found[-1] == 0.9
    # Of MACs what is left is the level itself.
    assert levels(40.0, 10.0, 1, None, limit=0.0) == pytest.approx([20.0, 10.0])
