"""A pruning step looked at: its statistic, and global magnitude beside it."""

from typing import Any

import numpy as np

BINS = 40
DECADES = 10
"""Of a histogram of saliencies, at most, below the largest."""

CHUNK = 1 << 20
"""Weights counted at a time: what counting takes in memory does not grow with them."""


def saliency_histogram(
    scores: np.ndarray, active: np.ndarray, kept: np.ndarray
) -> dict[str, Any]:
    """Counts of weights by the logarithm of their saliency, for who stays and who goes.

    Args:
        scores: The statistic before the step, 0 or more [d].
        active: The mask before the step [d], bool.
        kept: The mask after it [d], bool.

    Returns:
        ``low`` and ``high``, the outer edges of :data:`BINS` equal bins in log10 of the
        saliency; ``kept`` and ``removed``, counts of each bin, the first with all that
        is below; ``zeros``, how many [kept, removed] have no saliency and no bin.
    """
    largest, smallest = 0.0, np.inf
    for start in range(0, len(scores), CHUNK):
        part = scores[start : start + CHUNK][active[start : start + CHUNK]]
        part = part[part > 0]
        if part.size:
            largest = max(largest, float(part.max()))
            smallest = min(smallest, float(part.min()))
    low, high = 0.0, 1.0
    if largest > 0:
        high = float(np.log10(largest))
        low = max(float(np.log10(smallest)), high - DECADES)
        if high - low < 1e-6:
            low, high = low - 0.5, high + 0.5
    counts, zeros = np.zeros((2, BINS), int), np.zeros(2, int)
    for start in range(0, len(scores), CHUNK):
        place = slice(start, start + CHUNK)
        for row, chosen in enumerate((kept[place], ~kept[place])):
            part = scores[place][active[place] & chosen]
            zeros[row] += np.count_nonzero(part == 0)
            bins = (np.log10(part[part > 0]) - low) * (BINS / (high - low))
            clipped = np.clip(bins, 0, BINS - 1).astype(int)
            counts[row] += np.bincount(clipped, minlength=BINS)
    return {
        "low": low,
        "high": high,
        "kept": counts[0].tolist(),
        "removed": counts[1].tolist(),
        "zeros": zeros.tolist(),
    }


def magnitude_overlap(
    weights: np.ndarray, active: np.ndarray, kept: np.ndarray
) -> float:
    """Share of the weights that stay which global magnitude would keep as well.

    ``|M ∩ M'| / |M|``, with M' the mask of as many of the largest active weights.

    Args:
        weights: Before the step [d].
        active: The mask before the step [d], bool.
        kept: The mask M after it [d], bool.

    Returns:
        A fraction; 1 if no weight stays.
    """
    number = int(kept.sum())
    if number == 0:
        return 1.0
    sizes = np.where(active, np.abs(weights), -1.0)
    largest = np.argsort(-sizes, kind="stable")[:number]
    return float(kept[largest].sum() / number)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank.

    Args:
        first: [n].
        second: [n].

    Returns:
        A number in [-1, 1]; None where one of them is constant.
    """
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]
