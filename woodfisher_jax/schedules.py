"""When to prune and how far: sparsity levels over epochs, steps or recomputations."""

import operator
from typing import NamedTuple

from woodfisher_jax.options import check_fraction

SPACINGS = ("linear", "poly", "exponential")
"""How the steps of a way to a target are spaced."""

POLY_DEGREE = 3.0
"""Of "poly", unless said otherwise: that of the schedule over epochs."""


class Stage(NamedTuple):
    """One pruning step.

    Attributes:
        time: When, in the schedule's own unit (epochs or optimizer steps).
        sparsity: Sparsity over all prunable weights after it.
    """

    time: int
    sparsity: float


def polynomial_sparsity(
    time: float,
    start: float,
    end: float,
    initial: float,
    target: float,
    degree: float = 3.0,
) -> float:
    """Sparsity that rises fast at first and levels off at the target.

    ``s(t) = s_f + (s_i - s_f) (1 - (t - t₀) / (t₁ - t₀))^degree``, clipped to the
    two ends (Zhu & Gupta, arXiv:1710.01878, Eq. 1, with degree 3).

    Args:
        time: t.
        start: t₀.
        end: t₁ >= t₀; when both are equal the target holds from there on.
        initial: s_i in [0, 1).
        target: s_f in [s_i, 1).
        degree: Exponent; 1 is linear.

    Returns:
        The sparsity at ``time``.

    Example:
        >>> wf.schedules.polynomial_sparsity(5, 0, 10, initial=0.0, target=0.5)
        0.4375
    """
    if time >= end:
        return target
    if time <= start:
        return initial
    left = 1.0 - (time - start) / (end - start)
    return target + (initial - target) * left**degree


def gradual(
    start: int,
    end: int,
    frequency: int,
    initial: float,
    target: float,
    degree: float = 3.0,
) -> tuple[Stage, ...]:
    """The pruning steps of a gradual schedule; the last one always reaches the target.

    One at ``start`` (to ``initial``, if that is above 0), one each ``frequency`` after
    it, and one at ``end``.

    Note: where ``end`` is no multiple of ``frequency`` after ``start``, the original
    stops at the last multiple and never reaches its target: [1, 5, 40] to 90 % ends at
    0.899083 in epoch 36. Here a last step at ``end`` follows.

    Args:
        start: Time of the first step.
        end: Time of the last step.
        frequency: Time between steps.
        initial: Sparsity at ``start``.
        target: Sparsity at ``end``.
        degree: See :func:`polynomial_sparsity`.

    Returns:
        The steps in order of time.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> steps = wf.gradual(start=0, end=4, frequency=2, initial=0.5, target=0.9)
        >>> [(step.time, round(step.sparsity, 2)) for step in steps]
        [(0, 0.5), (2, 0.85), (4, 0.9)]
    """
    # Of NumPy and JAX as well, whose arrays have no place in a set.
    start, end, frequency = map(operator.index, (start, end, frequency))
    initial = check_fraction("initial", initial)
    target, degree = check_fraction("target", target), float(degree)
    if frequency < 1:
        raise ValueError(f"frequency={frequency}; expected 1 or more")
    if not 0 <= start <= end:
        raise ValueError(f"start={start}, end={end}; expected 0 <= start <= end")
    if initial > target:
        raise ValueError(
            f"initial={initial}, target={target}; expected initial <= target"
        )
    if not degree > 0:
        raise ValueError(f"degree={degree}; expected a positive number")
    times = sorted({*range(start, end + 1, frequency), end})
    stages = (
        Stage(t, polynomial_sparsity(t, start, end, initial, target, degree))
        for t in times
    )
    return tuple(stage for stage in stages if stage.sparsity > 0)


def one_shot(target: float, time: int = 0) -> tuple[Stage, ...]:
    """A single step straight to the target.

    Example:
        >>> wf.schedules.one_shot(0.9)
        (Stage(time=0, sparsity=0.9),)
    """
    return gradual(time, time, 1, target, target)


def levels(
    start: float,
    target: float,
    recomputations: int,
    degree: float | None,
    limit: float = 1.0,
) -> list[float]:
    """Levels on the way to a target, which is the last.

    ``l_i = start + (target - start) (1 - (1 - (i + 1) / (R + 1))^degree)`` for i from 0
    to R: R + 1 pruning steps. Without a degree, every step leaves the same share of
    what is left: ``l_i = a + (start - a) ((target - a) / (start - a))^((i+1)/(R+1))``.

    Note: the original starts from the scheduled level of its previous step, 0 at the
    first, whatever the masks are; here ``start`` is the sparsity that is there.

    Args:
        start: What the masks have already: a sparsity, or MACs.
        target: The same at the end.
        recomputations: R.
        degree: 1 is linear; above, the first steps are the longest; None exponential.
        limit: a, where nothing is left: sparsity 1, or 0 MACs.

    Returns:
        R + 1 floats.
    """
    ways = [(i + 1) / (recomputations + 1) for i in range(recomputations)]
    if degree is None:
        left = (target - limit) / (start - limit)
        return [*(limit + (start - limit) * left**way for way in ways), target]
    between = (start + (target - start) * (1 - (1 - way) ** degree) for way in ways)
    return [*between, target]
