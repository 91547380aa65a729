"""What a pruning step is compared with: global magnitude, the quadratic model."""

import numpy as np


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
