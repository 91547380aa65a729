"""How long the products of a network take on this machine, by their widths."""

import json
import statistics
import time
from collections.abc import Sequence
from itertools import product as combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.accounts import Speed, Value, free_entries
from woodfisher_jax.selection.structures import Structures
from woodfisher_jax.tracing.coupling import Coupling
from woodfisher_jax.tracing.entries.products import Cost
from woodfisher_jax.tracing.entries.units import Axis
from woodfisher_jax.written_files import replace_file

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the entries of an axis: the lengths that are timed; in between it is linear."""

REPEATS = 7
"""Timings of a product, of which the median counts."""

LEAST_SECONDS = 1e-3
"""Of a timing, for which short products run several times."""


def timed(found: Structures, file: str | Path | None = None) -> Structures:
    """Times the products of a network, whole and with fewer entries of their axes.

    Each dense layer and convolution, and each product of two activations, runs alone
    under ``jit`` with the examples that the network was traced with. What lies between
    them is not timed, so that the sum tells what products have to gain, not how long
    the network takes; the whole is timed by
    :func:`woodfisher_jax.weights.latency.forward_latency`.

    Args:
        found: From :func:`woodfisher_jax.structures`, with a batch of the size that
            matters.
        file: Of JSON, with times of this machine from before; times that it lacks are
            added. Default none.

    Returns:
        The structures with ``speeds``; ``account().left["latency"]`` is their sum, in
        milliseconds.

    Raises:
        OptionError: If the file is a folder or has something else.
    """
    path = None if file is None else Path(file)
    known: dict[str, float] = {}
    if path is not None and path.exists():
        known = _read(path)
    number = len(known)
    speeds = [_speed(cost, found.coupling, known) for cost in found.coupling.costs]
    if path is not None and len(known) > number:
        replace_file(path, json.dumps(known, indent=1))
    return found._replace(speeds=tuple(s for s in speeds if s is not None))


def _read(path: Path) -> dict[str, float]:
    try:
        known = json.loads(path.read_text())
        return {str(name): float(number) for name, number in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OptionError(
            "times",
            f"times={str(path)!r} holds no times ({type(error).__name__}: {error}); "
            "expected a JSON file that an earlier call wrote, or a new name",
        ) from error


def _speed(cost: Cost, coupling: Coupling, known: dict[str, float]) -> Speed | None:
    """How long a product takes; None where nothing of it can go."""
    groups = cost.equation.params.get("feature_group_count", 1)
    kinds: dict[tuple, tuple[int, Axis]] = {}
    places: list[list[int | None]] = []
    for axes in cost.operands:
        places.append([])
        for axis in axes:
            own = tuple(free_entries(coupling, axis))
            if own:
                # Axes with the same units become shorter together.
                key = tuple(unit for _, unit in own)
                number, _ = kinds.setdefault(key, (len(kinds), axis))
            places[-1].append(number if own else None)
    axes = tuple(axis for _, axis in kinds.values())
    if not axes or (groups > 1 and groups not in map(len, axes)):
        return None
    points = [
        sorted({max(1, round(share * len(axis))) for share in SHARES}) for axis in axes
    ]
    table = np.array(
        [
            _milliseconds(cost.equation, places, lengths, known)
            for lengths in combinations(*points)
        ]
    ).reshape([len(own) for own in points])
    # More entries do not take less time, whatever the noise.
    for i in range(table.ndim):
        table = np.maximum.accumulate(table, axis=i)
    return Speed(axes, _between(points, cost.rounds * table))


def _between(points: Sequence[Sequence[int]], table: np.ndarray) -> Value:
    # Imported here, since few need it and it takes long.
    from scipy.interpolate import RegularGridInterpolator

    at = RegularGridInterpolator(points, table, bounds_error=False, fill_value=None)
    return lambda lengths: max(float(at([lengths])[0]), 0.0)


def _milliseconds(
    equation: Any,
    places: Sequence[Sequence[int | None]],
    lengths: Sequence[int],
    known: dict[str, float],
) -> float:
    """The median of some timings of a product of these lengths."""
    shapes = [
        tuple(
            n if place is None else lengths[place]
            for n, place in zip(variable.aval.shape, own, strict=True)
        )
        for variable, own in zip(equation.invars, places, strict=True)
    ]
    settings = dict(equation.params)
    if settings.get("feature_group_count", 1) > 1:
        numbers = settings["dimension_numbers"]
        settings["feature_group_count"] = shapes[0][numbers.lhs_spec[1]]
    dtypes = [variable.aval.dtype for variable in equation.invars]
    name = f"{equation.primitive.name} {settings.get('dimension_numbers')} "
    name += " x ".join(f"{d}{list(s)}" for d, s in zip(dtypes, shapes, strict=True))
    if settings.get("window_strides"):
        name += f" strides {settings['window_strides']} padding {settings['padding']}"
    if name not in known:
        operands = [jnp.ones(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        run = jax.jit(lambda a, b: equation.primitive.bind(a, b, **settings))
        known[name] = round(1e3 * _seconds(run, operands), 6)
    return known[name]


def _seconds(run: Any, operands: Sequence[jax.Array]) -> float:
    jax.block_until_ready(run(*operands))
    times: list[float] = []
    rounds = 1
    while len(times) < REPEATS:
        start = time.perf_counter()
        for _ in range(rounds):
            found = run(*operands)
        jax.block_until_ready(found)
        spent = time.perf_counter() - start
        if spent < LEAST_SECONDS and not times:
            rounds *= max(2, int(LEAST_SECONDS / max(spent, 1e-7)))
            continue
        times.append(spent / rounds)
    return statistics.median(times)
