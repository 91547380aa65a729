"""Recomputation: the way to a target in several steps, with fresh curvature at each."""

SCHEDULES = ("linear", "poly", "exponential")
"""How the steps are spaced."""

POLY_DEGREE = 3.0
"""Of "poly", unless said otherwise: that of the schedule over epochs."""


def degree_of(schedule: str, degree: float | None) -> float | None:
    """The exponent of a schedule by name.

    Args:
        schedule: One of SCHEDULES.
        degree: Of "poly"; default 3.

    Returns:
        1 for "linear", None for "exponential".

    Raises:
        ValueError: If the schedule is unknown, the degree is not positive, or another
            schedule than "poly" is given one.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"recompute_schedule={schedule!r}; expected one of {list(SCHEDULES)}"
        )
    if schedule != "poly":
        if degree is not None:
            raise ValueError(
                f"recompute_degree={degree} makes no sense with recompute_schedule="
                f"{schedule!r}; leave it out, or take 'poly'"
            )
        return 1.0 if schedule == "linear" else None
    if degree is None:
        return POLY_DEGREE
    if not 0 < degree < float("inf"):
        raise ValueError(f"recompute_degree={degree}; expected a positive number")
    return float(degree)


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
