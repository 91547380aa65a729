"""Comparison with global magnitude, against scipy and counting by hand."""

import numpy as np
import pytest
from scipy import stats

from woodfisher_jax.pruning.diagnostics import magnitude_overlap, rank_correlation

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("digits", [1, 8])
def test_the_correlation_is_spearman_s_with_and_without_ties(digits) -> None:
    first = RANDOM.standard_normal(60).round(digits)
    second = (first + RANDOM.standard_normal(60)).round(digits)
    expected = stats.spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)


def test_a_monotonic_function_correlates_perfectly() -> None:
    first = RANDOM.standard_normal(30)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)


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
