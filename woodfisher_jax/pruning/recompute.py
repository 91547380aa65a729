"""Recomputation: the way to a target in several steps, with fresh curvature at each."""

SCHEDULES = ("linear", "poly")
"""How the steps are spaced."""

POLY_DEGREE = 3.0
"""Of "poly", unless said otherwise: that of the schedule over epochs."""


def degree_of(schedule: str, degree: float | None) -> float:
    """The exponent of a schedule by name.

    Args:
        schedule: "linear" or "poly".
        degree: Of "poly"; default 3.

    Raises:
        ValueError: If the schedule is unknown, the degree is not positive, or a linear
            schedule is given one.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"recompute_schedule={schedule!r}; expected one of {list(SCHEDULES)}"
        )
    if schedule == "linear":
        if degree is not None:
            raise ValueError(
                f"recompute_degree={degree} makes no sense with recompute_schedule="
                "'linear'; leave it out, or take 'poly'"
            )
        return 1.0
    if degree is None:
        return POLY_DEGREE
    if not 0 < degree < float("inf"):
        raise ValueError(f"recompute_degree={degree}; expected a positive number")
    return float(degree)


def levels(
    start: float, target: float, recomputations: int, degree: float
) -> list[float]:
    """Levels on the way to a target, which is the last.

    ``l_i = start + (target - start) (1 - (1 - (i + 1) / (R + 1))^degree)`` for i from 0
    to R: R + 1 pruning steps.

    Note: the original starts from the scheduled level of its previous step, 0 at the
    first, whatever the masks are; here ``start`` is the sparsity that is there.

    Args:
        start: What the masks have already: a sparsity, or MACs.
        target: The same at the end.
        recomputations: R.
        degree: 1 is linear; above, the first steps are the longest.

    Returns:
        R + 1 floats.
    """
    steps = recomputations + 1
    between = [
        start + (target - start) * (1 - (1 - (i + 1) / steps) ** degree)
        for i in range(recomputations)
    ]
    return [*between, target]
