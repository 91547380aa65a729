"""What a pruning step needs, before it starts: memory, traffic, arithmetic.

From that follows where gradients wait between the statistic and the update, how many
are formed at once, and whether the step can be carried out at all.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.curvature.checked import BATCH_BYTES, block_bytes, factor_bytes
from woodfisher_jax.equations.fisher import choose_solver, solver_flops
from woodfisher_jax.rows.budget import (
    MICROBATCH_SIZE,
    Budget,
    MemoryLimitError,
    budget_of,
    vectors_bytes,
)
from woodfisher_jax.rows.gradients import chunk_length, compile_gradients
from woodfisher_jax.rows.needs import Needs, Phase
from woodfisher_jax.rows.sharding import num_devices
from woodfisher_jax.rows.tiles import Panel, Part, split, whole
from woodfisher_jax.settings import STORES, Settings
from woodfisher_jax.trees.blocks import FlatOrder, Layout
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.samples import regroup

CPU_CHUNK_BYTES = 128 * 2**20
"""On a CPU, larger chunks of gradients than this leave the caches and are slower."""


class Storage(NamedTuple):
    """How the blocks are laid out and where their gradients wait.

    Attributes:
        store: A key of STORES.
        whole: All blocks.
        parts: Portions of them whose gradients are formed together.
        keep_factors: Whether the factors of the diagonal are kept for the update.
    """

    store: str
    whole: Part
    parts: tuple[Part, ...]
    keep_factors: bool


def plan(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    samples: Any,
    order: FlatOrder,
    layout: Layout,
    settings: Settings,
) -> tuple[Needs, Storage | None]:
    """Plans a step: chooses what is open in the settings, or says that it cannot be.

    Compiles the gradients of one chunk, which the step itself then uses, and computes
    nothing. ``params``, ``masks`` and ``samples`` may be shapes.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree.
        masks: From path to bool.
        samples: As for :func:`woodfisher_jax.prune`.
        order: The flat order of the prunable tensors.
        layout: Which weight sits in which block; () if no gradient is kept.
        settings: Of the step.

    Returns:
        The needs, and where the gradients go; None if none are kept.

    Raises:
        MemoryLimitError: If it does not fit in memory or on the disk.
    """
    budget = budget_of(settings)
    example = next(regroup(samples, 1))
    work = _gradient_work(loss_fn, params, masks, example, order, settings, budget)
    if not layout:
        needs = _needs(work, None, settings, budget)
        if needs.peak_bytes > budget.limit:
            _refuse(needs, None, work, settings, budget)
        return needs, None
    part = whole(order, layout, settings.num_samples, num_devices(settings.mesh))
    for storage in _candidates(part, work, settings, budget):
        needs = _needs(work, storage, settings, budget)
        if _fits(needs, storage, budget):
            return needs, storage
    _refuse(needs, part, work, settings, budget)


# ------------------------------------------------------------------------- gradients


class _GradientWork(NamedTuple):
    """Forming the gradients of all samples.

    Attributes:
        order: The flat order of the prunable tensors.
        microbatch_size: Examples at once on a device.
        samples: Gradients at once on a device.
        bytes: Memory of a device for that, results included.
        flops: Over all samples and devices.
    """

    order: FlatOrder
    microbatch_size: int
    samples: int
    bytes: int
    flops: float


def _gradient_work(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    example: Any,
    order: FlatOrder,
    settings: Settings,
    budget: Budget,
) -> _GradientWork:
    """Compiles the gradients of a chunk; a smaller one if the first does not fit."""
    vectors = vectors_bytes(order, settings, budget)
    room = (budget.limit - budget.used - vectors) // budget.sharers
    devices = num_devices(settings.mesh)

    def work(microbatch_size: int) -> _GradientWork:
        found = compile_gradients(
            loss_fn,
            params,
            masks,
            example,
            num_samples=settings.num_samples,
            batch_size=settings.batch_size,
            microbatch_size=microbatch_size,
            mesh=settings.mesh,
        )
        n = chunk_length(
            settings.num_samples, settings.batch_size, microbatch_size, devices
        )
        chunks = -(-settings.num_samples // (n * devices))
        size = found.temporary_bytes + _rows_bytes(order, n)
        return _GradientWork(order, microbatch_size, n, size, chunks * found.flops)

    if settings.microbatch_size is not None:
        return work(settings.microbatch_size)
    room = min(room // 2, CPU_CHUNK_BYTES) if budget.shared else room // 2
    # A first guess by the results alone; what lies between is known when compiled.
    most = MICROBATCH_SIZE
    while most > 1 and _rows_bytes(order, -(-most // settings.batch_size)) > room:
        most //= 2
    found = work(most)
    while found.bytes > room and found.microbatch_size > 1:
        share = room / found.bytes
        most = max(1, min(most // 2, int(share * most)))
        found = work(most)
    return found


def _rows_bytes(order: FlatOrder, samples: int) -> int:
    """A chunk of gradients: by tensor, as flat rows, by block, and the one before."""
    return 4 * 4 * order.size * samples


# --------------------------------------------------------------------------- storage


def _candidates(
    part: Part, work: _GradientWork, settings: Settings, budget: Budget
) -> Iterator[Storage]:
    """What the settings leave open, the best first."""
    if settings.store != "auto":
        stores: tuple[str, ...] = (settings.store,)
    elif budget.shared:
        stores = tuple(store for store in STORES if store != "host")
    else:
        stores = STORES
    for store in stores:
        kept = [
            Storage(
                store, part, _parts(store, part, keep, work, settings, budget), keep
            )
            for keep in (True, False)
        ]
        # Forming gradients once more costs more than any factor.
        yield from sorted(kept, key=lambda storage: len(storage.parts))


def _parts(
    store: str,
    part: Part,
    keep_factors: bool,
    work: _GradientWork,
    settings: Settings,
    budget: Budget,
) -> tuple[Part, ...]:
    """All at once, or for recomputation as much at a time as there is room for."""
    if store != "recompute":
        return (part,)
    computing = _computing(part, keep_factors, settings, budget)
    taken = vectors_bytes(work.order, settings, budget) + budget.used
    taken += max(budget.sharers * work.bytes, computing)
    room = (budget.limit - taken) // budget.sharers
    return split(part, room // _row_bytes(1, settings))


def _computing(
    part: Part, keep_factors: bool, settings: Settings, budget: Budget
) -> int:
    """The curvature of a panel, and the factors of all if they are kept."""
    solvers = [(panel, _solver(panel, settings)) for panel in part.panels]
    largest = max(_panel_bytes(p, solver, settings, budget) for p, solver in solvers)
    factors = sum(
        p.num_blocks * factor_bytes(settings.num_samples, p.width, solver)
        for p, solver in solvers
    )
    return budget.sharers * (largest + (factors if keep_factors else 0))


def _row_bytes(columns: int, settings: Settings) -> int:
    """So many columns of all samples on one device."""
    item = jnp.dtype(settings.store_dtype).itemsize
    return settings.num_samples * columns * item


def _solver(panel: Panel, settings: Settings) -> str:
    if settings.solver != "auto":
        return settings.solver
    return choose_solver(settings.num_samples, panel.width)


def _needs(
    work: _GradientWork,
    storage: Storage | None,
    settings: Settings,
    budget: Budget,
) -> Needs:
    """What a step takes with this storage."""
    many = budget.sharers
    static = budget.used + vectors_bytes(work.order, settings, budget)
    devices, n = num_devices(settings.mesh), settings.num_samples
    panels = storage.whole.panels if storage else ()
    columns = storage.whole.columns if storage else 0
    stored = devices * _row_bytes(columns, settings)
    passes = len(storage.parts) if storage else 1
    place = storage.store if storage else ""
    if storage and place in ("device", "host", "recompute"):
        kept = _row_bytes(max(p.columns for p in storage.parts), settings)
        static += many * kept if place != "host" or budget.shared else 0
    solvers = [(panel, _solver(panel, settings)) for panel in panels]
    keep = storage is not None and storage.keep_factors
    computing = _computing(storage.whole, keep, settings, budget) if storage else 0
    flops = np.zeros(2)
    for p, solver in solvers:
        flops += devices * p.num_blocks * np.asarray(solver_flops(n, p.width, solver))
    forming = passes * work.flops
    again = place == "recompute"
    gradients = Phase("gradients", forming, stored, static + many * work.bytes)
    curvature = Phase("curvature", float(flops.sum()), stored, static + computing)
    update = Phase(
        "update",
        float(0 if keep else flops[0]) + (forming if again else 0),
        stored,
        static + computing,
    )
    return Needs(
        store=place,
        store_dtype=settings.store_dtype,
        store_bytes=stored,
        passes=passes,
        keep_factors=keep,
        microbatch_size=work.microbatch_size,
        num_weights=work.order.size,
        num_samples=n,
        batch_size=settings.batch_size,
        blocks=_block_counts(solvers, devices),
        phases=(gradients, curvature, update) if storage else (gradients,),
        limit_bytes=budget.limit,
    )


def _panel_bytes(panel: Panel, solver: str, settings: Settings, budget: Budget) -> int:
    """A panel being fetched, as columns, as blocks, and the one before; its work."""
    held = 4 * _row_bytes(panel.stop - panel.start, settings)
    one = block_bytes(settings.num_samples, panel.width, solver)
    return held + (one if budget.shared else max(one, BATCH_BYTES))


def _block_counts(
    solvers: list[tuple[Panel, str]], devices: int
) -> tuple[tuple[int, int, str], ...]:
    counts: dict[tuple[int, str], int] = {}
    for panel, solver in solvers:
        key = (panel.width, solver)
        counts[key] = counts.get(key, 0) + devices * panel.num_blocks
    return tuple((width, n, solver) for (width, solver), n in counts.items())


def _fits(needs: Needs, storage: Storage, budget: Budget) -> bool:
    here = needs.store_bytes * budget.devices // max(1, len(storage.whole.indices))
    if storage.store == "disk" and here > budget.disk:
        return False
    if storage.store == "host" and budget.host_used + here > budget.host_limit:
        return False
    return needs.peak_bytes <= budget.limit


# ------------------------------------------------------------------------------ refusal


def _refuse(
    needs: Needs,
    part: Part | None,
    work: _GradientWork,
    settings: Settings,
    budget: Budget,
) -> NoReturn:
    worst = max(needs.phases, key=lambda phase: phase.peak_bytes)
    where = "the memory limit" if budget.shared else "the memory of the device"
    widest = max((width for width, _, _ in needs.blocks), default=0)
    here = needs.store_bytes * budget.devices // num_devices(settings.mesh)
    if needs.peak_bytes > budget.limit:
        room = (
            f"{needs.peak_bytes / 1e9:.3g} GB of memory for its {worst.name}, and "
            f"{where} is {budget.limit / 1e9:.3g} GB"
        )
    elif needs.store == "host":
        room = (
            f"{here / 1e9:.3g} GB of the host's memory for its gradients, and "
            f"{max(0, budget.host_limit - budget.host_used) / 1e9:.3g} GB are free"
        )
    else:
        room = (
            f"{here / 1e9:.3g} GB for its gradients, and {budget.disk / 1e9:.3g} GB of "
            "disk are free"
        )
    active = None
    if part is not None:
        # Blocks of the active weights alone are cut anew.
        active = np.zeros(part.order.size + 1, bool)
        active[part.indices] = True
        active = active[:-1]
    ways = _ways_out(widest, active, work, settings, budget)
    raise MemoryLimitError(
        f"this pruning step needs {room} ({needs.num_weights:,} weights, num_samples="
        f"{needs.num_samples}, blocks of up to {widest:,}, store={needs.store!r}, "
        f"microbatch_size={needs.microbatch_size}). "
        + (f"It fits with {' or '.join(ways)}" if ways else "Take a larger machine")
    )


def _ways_out(
    widest: int,
    active: np.ndarray | None,
    work: _GradientWork,
    settings: Settings,
    budget: Budget,
) -> list[str]:
    """For each setting that could make it fit, the nearest value found that does."""

    def fits(changed: Settings) -> bool:
        method = changed.method
        if method.layout is None:
            small = _scaled(work, changed)
            return _needs(small, None, changed, budget).peak_bytes <= budget.limit
        layout = method.layout(work.order, changed.block_size, active)
        devices = num_devices(changed.mesh)
        part = whole(work.order, layout, changed.num_samples, devices)
        small = _scaled(work, changed)
        return any(
            _fits(_needs(small, storage, changed, budget), storage, budget)
            for storage in _candidates(part, small, changed, budget)
        )

    found = []
    if settings.store != "auto" and fits(settings._replace(store="auto")):
        found.append("store='auto'")
    if (settings.microbatch_size or 1) > 1 and fits(
        settings._replace(microbatch_size=1)
    ):
        found.append("microbatch_size=1")
    for width in _halvings(widest, 64):
        if fits(settings._replace(block_size=width)):
            found.append(f"block_size={width}")
            break
    for number in _halvings(settings.num_samples, 8):
        if fits(settings._replace(num_samples=number)):
            found.append(f"num_samples={number}")
            break
    return found


def _scaled(work: _GradientWork, changed: Settings) -> _GradientWork:
    """The same work with the chunks of changed settings."""
    samples = chunk_length(
        changed.num_samples,
        changed.batch_size,
        changed.microbatch_size or work.microbatch_size,
        num_devices(changed.mesh),
    )
    return work._replace(bytes=work.bytes * samples // work.samples, samples=samples)


def _halvings(start: int, least: int) -> Iterator[int]:
    value = start // 2
    while value >= least:
        yield value
        value //= 2
