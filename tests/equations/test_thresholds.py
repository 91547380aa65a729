"""The highest scores, against a stable sort."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.equations.thresholds import (
    keep_about,
    keep_highest,
    nth_highest,
    running_count,
)

SIZES = (1, 2, 16)  # few, because each size compiles again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_nth_highest_is_that_of_a_sort(dtype) -> None:
    values = jax.random.normal(jax.random.key(0), (3, 5)).astype(dtype)
    values = values.at[0, 0].set(-jnp.inf)
    falling = np.sort(np.asarray(values, np.float32).ravel())[::-1]
    found = [nth_highest(values, n) for n in (1, 7, 15)]
    np.testing.assert_array_equal(np.float32(found), falling[[0, 6, 14]])


@pytest.mark.parametrize("size", [1, 2, 5, 64, 100])
def test_the_running_count_is_that_of_a_sum(size) -> None:
    marks = np.arange(size) % 3 != 1
    np.testing.assert_array_equal(running_count(jnp.asarray(marks)), np.cumsum(marks))


def highest(scores: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    """Oracle: among the active, by falling score and then by rising index."""
    active = np.flatnonzero(mask)
    ranked = sorted(active.tolist(), key=lambda i: (-float(scores[i]), i))
    result = np.zeros(len(scores), bool)
    result[ranked[:kept]] = True
    return result


@st.composite
def selections(draw):
    size = draw(st.sampled_from(SIZES))
    score = st.one_of(
        st.sampled_from([0.0, 1.0, 1.5, 2.0, 2.0**-140]),
        st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False),
    )
    scores = draw(st.lists(score, min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    kept = draw(st.integers(0, size))
    return np.asarray(scores, np.float32), np.asarray(mask), kept


def select(scores: np.ndarray, mask: np.ndarray, kept: int) -> np.ndarray:
    # XLA takes subnormal numbers for zero, so that ties among them are by index.
    return np.asarray(
        keep_highest(jnp.asarray(scores), jnp.asarray(mask), jnp.int32(kept))
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(selections())
def test_the_highest_stay_and_ties_go_by_index(case) -> None:
    scores, mask, kept = case
    scores = np.where(np.abs(scores) < np.finfo(np.float32).tiny, 0, scores)
    found = select(scores, mask, kept)
    np.testing.assert_array_equal(found, highest(scores, mask, kept))
    assert found.sum() == min(kept, mask.sum())
    assert not (found & ~mask).any()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(selections(), st.integers(0, 16))
def test_keeping_fewer_is_nested_in_keeping_more(case, other) -> None:
    scores, mask, kept = case
    fewer, more = sorted((kept, min(other, len(scores))))
    assert not (select(scores, mask, fewer) & ~select(scores, mask, more)).any()


def test_a_score_below_every_other_still_beats_a_pruned_weight() -> None:
    scores = np.asarray([-3e38, 5.0], np.float32)
    found = select(scores, np.asarray([True, False]), 1)
    np.testing.assert_array_equal(found, [True, False])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(selections())
def test_tensors_share_out_equal_scores(case) -> None:
    scores, mask, kept = case
    size = len(scores)
    bounds = tuple(sorted({0, size // 4, size // 2, size}))
    scores = np.round(np.clip(scores, -2, 2))  # so that many are equal
    given = jnp.asarray(scores), jnp.asarray(mask), jnp.int32(kept)
    found = np.asarray(keep_highest(*given, bounds))
    assert found.sum() == min(kept, mask.sum())
    assert not (found & ~mask).any()
    lowest = scores[found].min() if found.any() else np.inf
    assert not (mask & ~found & (scores > lowest)).any()
    tied = mask & (scores == lowest)
    share = found[tied].mean() if tied.any() else 0
    for start, stop in pairwise(bounds):
        own, stays = tied[start:stop], (found & tied)[start:stop]
        assert abs(stays.sum() - share * own.sum()) <= 1
        where = stays[own]
        assert (np.diff(where.astype(int)) <= 0).all()  # those of lower index


def test_three_equal_tensors_lose_as_much_each() -> None:
    equal = jnp.full(300, 0.1)
    found = keep_highest(equal, jnp.ones(300, bool), jnp.int32(150), (0, 100, 200, 300))
    np.testing.assert_array_equal(found, np.tile(np.arange(100) < 50, 3))


def test_a_sample_gives_nearly_as_many() -> None:
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (1, 512, 600)))
    mask = keep_about(scores, jnp.ones(scores.shape, bool), 100_000)
    assert abs(int(mask.sum()) - 100_000) < 2_000
