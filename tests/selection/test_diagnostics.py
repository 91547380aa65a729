"""Histogram of saliencies and comparison with magnitude, against NumPy and scipy."""

import numpy as np
import pytest
from scipy import stats

from woodfisher_jax.selection import diagnostics
from woodfisher_jax.selection.diagnostics import (
    BINS,
    DECADES,
    magnitude_overlap,
    rank_correlation,
    saliency_histogram,
)

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("digits", [1, 8])
def test_the_correlation_is_spearman_s_with_and_without_ties(digits) -> None:
    first = RANDOM.standard_normal(60).round(digits)
    second = (first + RANDOM.standard_normal(60)).round(digits)
    expected = stats.spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)


def test_a_constant_has_no_correlation() -> None:
    assert rank_correlation(np.ones(5), np.arange(5.0)) is None
    assert rank_correlation(np.ones(1), np.ones(1)) is None
    assert rank_correlation(np.ones(0), np.ones(0)) is None


def test_the_overlap_counts_among_the_active() -> None:
    weights = np.asarray([5.0, -4.0, 3.0, -2.0, 1.0])
    active = np.asarray([False, True, True, True, True])
    kept = np.asarray([False, True, False, True, False])
    # Magnitude keeps the second and the third.
    assert magnitude_overlap(weights, active, kept) == 0.5
    assert magnitude_overlap(weights, active, active) == 1
    assert magnitude_overlap(weights, active, np.zeros(5, bool)) == 1


def test_the_histogram_is_numpy_s_and_forgets_no_weight() -> None:
    scores = np.float32(10.0 ** RANDOM.uniform(-6, 2, 3000))
    scores[:7] = 0
    active = RANDOM.random(3000) < 0.8
    kept = active & (scores > 1e-2)
    found = saliency_histogram(scores, active, kept)
    edges = np.linspace(found["low"], found["high"], BINS + 1)
    for name, which in (("kept", kept), ("removed", active & ~kept)):
        expected, _ = np.histogram(np.log10(scores[which & (scores > 0)]), edges)
        # A score on an edge may round to either side.
        assert np.abs(np.cumsum(expected - found[name])).max() <= 1
    zeros = active & (scores == 0)
    assert found["zeros"] == [0, zeros.sum()]
    total = sum(found["kept"]) + sum(found["removed"]) + sum(found["zeros"])
    assert total == active.sum()


def test_the_histogram_does_not_depend_on_chunks(monkeypatch) -> None:
    scores = np.float32(RANDOM.random(100))
    active, kept = RANDOM.random((2, 100)) < 0.5
    whole = saliency_histogram(scores, active, kept & active)
    monkeypatch.setattr(diagnostics, "CHUNK", 7)
    assert saliency_histogram(scores, active, kept & active) == whole


def test_a_histogram_without_spread() -> None:
    every, none = np.ones(3, bool), np.zeros(3, bool)
    same = saliency_histogram(np.full(3, 0.01), every, every)
    assert (same["low"], same["high"]) == (-2.5, -1.5)
    assert sum(same["kept"]) == 3
    empty = saliency_histogram(np.zeros(3), every, none)
    assert empty["zeros"] == [0, 3]
    assert sum(empty["removed"]) == 0


def test_what_is_far_below_the_rest_shares_the_first_bin() -> None:
    every = np.ones(3, bool)
    found = saliency_histogram(np.asarray([1e-30, 1e-25, 1.0]), every, every)
    assert found["low"] == -DECADES
    assert (found["kept"][0], found["kept"][-1]) == (2, 1)
