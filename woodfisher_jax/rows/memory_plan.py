"""The memory plan of a pruning step: bytes and arithmetic, before anything is computed.

From the plan follow the tier that keeps the gradients between the statistic and the
update, how many examples a device takes at once, and whether the step fits at all.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax.numpy as jnp

from woodfisher_jax.equations.fisher import solver_flops
from woodfisher_jax.rows.budget import (
    BATCH_BYTES,
    Budget,
    block_bytes,
    budget_of,
    factor_bytes,
)
from woodfisher_jax.rows.compute import STORES
from woodfisher_jax.rows.gradients import chunk_length, compile_rows
from woodfisher_jax.rows.needs import Needs, Passes, Phase
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.sharding import num_devices
from woodfisher_jax.rows.tiles import Pass, split, whole
from woodfisher_jax.trees.blocks import Layout

MICROBATCH_SIZE = 128
"""Examples at once, where they fit; more is no faster."""

VECTOR_BYTES = 46
"""For each prunable weight: weights, diagonal, scores and direction, what sorting the
scores takes, masks, indices, which weights a sample has touched."""

SLOPE_BYTES = 16
"""More of the same for first-order methods: ḡ as it is accumulated and flat, h, and
w - h."""

CPU_CHUNK_BYTES = 128 * 2**20
"""On a CPU, larger chunks of gradients than this leave the caches and are slower."""

LayoutOf = Callable[[int | None], Layout]
"""From a block size to which weight sits in which block."""


class MemoryLimitError(MemoryError):
    """A pruning step that does not fit; the message says what would."""


class Storage(NamedTuple):
    """How the blocks are laid out and where their gradients wait.

    Attributes:
        store: One of :data:`~woodfisher_jax.rows.compute.STORES`.
        whole: All blocks.
        passes: The same, cut into what is formed in one pass over the samples; more
            than one only for "recompute".
        keep_factors: Whether the factors of the diagonal are kept for the update.
    """

    store: str
    whole: Pass
    passes: tuple[Pass, ...]
    keep_factors: bool


def plan_rows(
    problem: Problem,
    *,
    layouts: LayoutOf | None,
    block_size: int | None,
    vector_bytes: int = VECTOR_BYTES,
) -> tuple[Needs, Storage | None]:
    """Plans a step whose curvature is built from per-sample gradients.

    Chooses what ``problem.compute`` leaves open. Compiles the gradients of one chunk,
    which the step itself then uses, and computes nothing.

    Args:
        problem: Its params, masks and samples may be shapes.
        layouts: From a block size to the layout; None where no gradient is kept.
        block_size: c, the one in question.
        vector_bytes: Memory of the step's flat vectors for each weight.

    Returns:
        The needs, and where the gradients wait; None if none are kept.

    Raises:
        MemoryLimitError: If no plan fits in memory or on the disk.
    """
    budget = budget_of(problem.compute)
    static = _static_bytes(problem, budget, vector_bytes)
    microbatch_size, forming = _forming(problem, budget, static)
    planner = _Planner(problem, budget, static, microbatch_size, forming)
    plans = planner.plans(layouts and layouts(block_size))
    for needs, storage in plans:
        if planner.shortage(needs) is None:
            return needs, storage
    needs, _ = plans[-1]
    widest = max((width for width, _, _ in needs.blocks), default=0)
    ways = _suggestions(planner, layouts, block_size, widest)
    limited = problem.compute.memory_limit is not None
    otherwise = "Raise memory_limit" if limited else "Take a larger machine"
    raise MemoryLimitError(
        f"this pruning step needs {planner.shortage(needs)} ({needs.num_weights:,} "
        f"weights, num_samples={needs.num_samples}, blocks of up to {widest:,}, store="
        f"{needs.store!r}, microbatch_size={needs.microbatch_size}). "
        + (f"It fits with {' or '.join(ways)}" if ways else otherwise)
    )


def plan_passes(passes: Callable[[int], Passes], problem: Problem) -> Needs:
    """Plans a step whose curvature is accumulated over the samples, keeping no rows.

    Args:
        passes: From examples at once to what the passes need.
        problem: The samples and what may be taken of the machine.

    Raises:
        MemoryLimitError: If it does not fit in memory.
    """
    budget, order = budget_of(problem.compute), problem.order
    static = _static_bytes(problem, budget, VECTOR_BYTES)
    most, needed = _largest_fitting(
        passes,
        problem.compute.microbatch_size,
        MICROBATCH_SIZE,
        (budget.limit - static) // 2,
    )
    phases = [Phase("gradients", needed.flops, 0, static + needed.bytes)]
    if needed.bytes_after:
        after = static + (needed.bytes_after if budget.shared else 0)
        phases.append(Phase("curvature", needed.flops_after, 0, after))
    needs = _unstored(problem, budget, most, phases)
    taken, limit, of_host = needs.peak_bytes, budget.limit, budget.shared
    if budget.host_used + needed.bytes_after > budget.host_limit:
        taken, limit = budget.host_used + needed.bytes_after, budget.host_limit
        of_host = True
    if taken > limit:
        given = problem.compute.memory_limit if of_host else None
        ways = [] if given is None else ["raise memory_limit"]
        ways += ["take a smaller microbatch_size"] if most > 1 else []
        ways += ["leave out the widest layers (prunable)"]
        raise MemoryLimitError(
            f"this pruning step needs {taken / 1e9:.3g} GB of memory, and "
            f"{_limit(given, limit, 'the limit')} ({order.size:,} weights, "
            f"microbatch_size={most}); {', '.join(ways)}, or choose woodfisherblock, "
            "whose block_size bounds its memory"
        )
    return needs


def _limit(given: float | None, bytes_: int, otherwise: str) -> str:
    """A limit in words, by the option that has set it."""
    size = f"{bytes_ / 1e9:.3g} GB"
    if given is None:
        return f"{otherwise} is {size}"
    return f"memory_limit={given:.12g} allows {size}"


def _static_bytes(problem: Problem, budget: Budget, vector_bytes: int) -> int:
    """Memory that every phase takes: what is used already, and the flat vectors."""
    return budget.used + budget.sharers * vector_bytes * problem.order.size


def _unstored(
    problem: Problem, budget: Budget, microbatch_size: int, phases: list[Phase]
) -> Needs:
    """The needs of a step that keeps no gradients."""
    return Needs(
        store="",
        store_dtype=problem.compute.store_dtype,
        store_bytes=0,
        passes=1,
        keep_factors=False,
        microbatch_size=microbatch_size,
        num_weights=problem.order.size,
        num_samples=problem.num_samples,
        batch_size=problem.batch_size,
        blocks=(),
        phases=tuple(phases),
        limit_bytes=budget.limit,
    )


# ------------------------------------------------------------------- examples at once


def _largest_fitting(
    passes: Callable[[int], Passes], given: int | None, most: int, room: int
) -> tuple[int, Passes]:
    """How many examples go at once, at most ``most`` unless given, and their needs."""
    if given is not None:
        return given, passes(given)
    needed = passes(most)
    while needed.bytes > room and most > 1:
        # In proportion, and by half at least: every attempt compiles.
        most = max(1, min(most // 2, int(room / needed.bytes * most)))
        needed = passes(most)
    return most, needed


def _forming(problem: Problem, budget: Budget, static: int) -> tuple[int, Passes]:
    """Examples at once on a device, and what forming all gradients then needs."""
    devices = num_devices(problem.compute.mesh)

    def passes(microbatch_size: int) -> Passes:
        program = compile_rows(problem, microbatch_size)
        length = _chunk_length(problem, microbatch_size)
        chunks = -(-problem.num_samples // (length * devices))
        size = program.temporary_bytes + _chunk_bytes(problem, length)
        return Passes(size, chunks * program.flops)

    room = (budget.limit - static) // (2 * budget.sharers)
    if budget.shared:
        room = min(room, CPU_CHUNK_BYTES)
    # The results alone bound the first attempt, before anything is compiled.
    most = MICROBATCH_SIZE
    while most > 1 and _chunk_bytes(problem, -(-most // problem.batch_size)) > room:
        most //= 2
    return _largest_fitting(passes, problem.compute.microbatch_size, most, room)


def _chunk_length(problem: Problem, microbatch_size: int) -> int:
    """Gradients that a device forms at once."""
    devices = num_devices(problem.compute.mesh)
    return chunk_length(
        problem.num_samples, problem.batch_size, microbatch_size, devices
    )


def _chunk_bytes(problem: Problem, length: int) -> int:
    """A chunk of gradients: by tensor, as flat rows, by block, and the one before."""
    return 4 * 4 * problem.order.size * length


# --------------------------------------------------------------------- stored gradients


class _Planner(NamedTuple):
    """What the plans of one problem have in common.

    Attributes:
        problem: Of the step.
        budget: What there is.
        static: Bytes that every phase takes, of the memory that the limit is about.
        microbatch_size: Examples at once on a device.
        forming: Memory of a device and arithmetic of all for forming the gradients.
    """

    problem: Problem
    budget: Budget
    static: int
    microbatch_size: int
    forming: Passes

    def plans(self, layout: Layout | None) -> list[tuple[Needs, Storage | None]]:
        """Every plan that the options allow, the best first, whether it fits or not."""
        if layout is None:
            return [(self._needs(None), None)]
        compute, order = self.problem.compute, self.problem.order
        devices = num_devices(compute.mesh)
        everything = whole(order, layout, self.problem.num_samples, devices)
        # On a CPU, the host's memory is the device's.
        automatic = [s for s in STORES if s != "host" or not self.budget.shared]
        storages: list[Storage] = []
        for store in automatic if compute.store == "auto" else [compute.store]:
            both = [
                Storage(store, everything, self._passes(store, everything, keep), keep)
                for keep in (True, False)
            ]
            # Forming gradients again costs more than factorizing again.
            storages += sorted(both, key=lambda storage: len(storage.passes))
        return [(self._needs(storage), storage) for storage in storages]

    def shortage(self, needs: Needs) -> str | None:
        """What there is too little of for a plan, in words; None if it fits."""
        budget, given = self.budget, self.problem.compute.memory_limit
        devices = num_devices(self.problem.compute.mesh)
        stored = needs.store_bytes * budget.devices // devices
        if needs.peak_bytes > budget.limit:
            worst = max(needs.phases, key=lambda phase: phase.peak_bytes)
            limit = _limit(None, budget.limit, "the memory of the device")
            if budget.shared:
                limit = _limit(given, budget.limit, "the memory limit")
            return (
                f"{needs.peak_bytes / 1e9:.3g} GB of memory for its {worst.name}, and "
                f"{limit}"
            )
        if needs.store == "host" and budget.host_used + stored > budget.host_limit:
            free = max(0, budget.host_limit - budget.host_used)
            return (
                f"{stored / 1e9:.3g} GB of the host's memory for its gradients, and "
                f"{_limit(given, free, 'what is free')}"
            )
        if needs.store == "disk" and stored > budget.disk:
            return (
                f"{stored / 1e9:.3g} GB for its gradients, and "
                f"{budget.disk / 1e9:.3g} GB of disk are free"
            )
        return None

    def _needs(self, storage: Storage | None) -> Needs:
        """What the step needs with its gradients there."""
        sharers, forming = self.budget.sharers, self.forming
        peak = self.static + sharers * forming.bytes
        phases = [Phase("gradients", forming.flops, 0, peak)]
        needs = _unstored(self.problem, self.budget, self.microbatch_size, phases)
        if storage is None:
            return needs
        store, everything, passes, keep_factors = storage
        blocks = self._blocks(everything)
        stored = len(everything.indices) * self._row_bytes(everything.columns)
        in_memory = 0
        if store in ("device", "recompute") or (store == "host" and self.budget.shared):
            in_memory = sharers * self._row_bytes(max(p.columns for p in passes))
        computing = self.static + in_memory + self._computing(everything, keep_factors)
        factorizing = diagonals = 0.0
        for width, number, solver in blocks:
            each = solver_flops(self.problem.num_samples, width, solver)
            factorizing += number * each[0]
            diagonals += number * each[1]
        gradients = len(passes) * forming.flops
        update = 0.0 if keep_factors else factorizing
        if store == "recompute":
            update += gradients
        return needs._replace(
            store=store,
            store_bytes=stored,
            passes=len(passes),
            keep_factors=keep_factors,
            blocks=blocks,
            phases=(
                Phase("gradients", gradients, stored, peak + in_memory),
                Phase("curvature", factorizing + diagonals, stored, computing),
                Phase("update", update, stored, computing),
            ),
        )

    def _passes(self, store: str, everything: Pass, keep: bool) -> tuple[Pass, ...]:
        """One pass, or for recomputation as few as the memory allows."""
        if store != "recompute":
            return (everything,)
        sharers = self.budget.sharers
        computing = self._computing(everything, keep)
        taken = self.static + max(sharers * self.forming.bytes, computing)
        room = (self.budget.limit - taken) // sharers
        return split(everything, room // self._row_bytes(1))

    def _blocks(self, everything: Pass) -> tuple[tuple[int, int, str], ...]:
        """(width, number of blocks over all devices, solver) of each width."""
        numbers: dict[int, int] = {}
        for tile in everything.tiles:
            number = len(everything.indices) * tile.num_blocks
            numbers[tile.width] = numbers.get(tile.width, 0) + number
        samples, compute = self.problem.num_samples, self.problem.compute
        return tuple(
            (width, number, compute.solver_for(samples, width))
            for width, number in numbers.items()
        )

    def _computing(self, everything: Pass, keep_factors: bool) -> int:
        """Memory for the curvature of a tile, and for all factors if they are kept."""
        samples = self.problem.num_samples
        largest = factors = 0
        for width, number, solver in self._blocks(everything):
            work = block_bytes(samples, width, solver)
            if not self.budget.shared:
                work = max(work, BATCH_BYTES)
            columns = max(t.columns for t in everything.tiles if t.width == width)
            # A tile as it is fetched, as columns, as blocks, and the one before.
            largest = max(largest, 4 * self._row_bytes(columns) + work)
            each = number // len(everything.indices)
            factors += each * factor_bytes(samples, width, solver)
        return self.budget.sharers * (largest + (factors if keep_factors else 0))

    def _row_bytes(self, columns: int) -> int:
        """Stored gradients of so many columns of all samples on one device."""
        item = jnp.dtype(self.problem.compute.store_dtype).itemsize
        return self.problem.num_samples * columns * item


# -------------------------------------------------------------------------- suggestions


def _suggestions(
    planner: _Planner, layouts: LayoutOf | None, block_size: int | None, widest: int
) -> list[str]:
    """For each option that could make the step fit, the nearest value that does."""
    problem, compute = planner.problem, planner.problem.compute
    values: dict[str, Iterable[Any]] = {
        "store": () if compute.store == "auto" else ("auto",),
        "microbatch_size": (1,) if (compute.microbatch_size or 1) > 1 else (),
        "block_size": _halvings(widest, 64),
        "num_samples": _halvings(problem.num_samples, 8),
    }

    def fits(option: str, value: Any) -> bool:
        width, changed = block_size, problem
        if option == "block_size":
            width = value
        elif option == "num_samples":
            changed = problem._replace(num_samples=value)
        else:
            changed = problem._replace(compute=compute.replace(**{option: value}))
        other = _rescaled(planner, changed)
        plans = other.plans(layouts and layouts(width))
        return any(other.shortage(needs) is None for needs, _ in plans)

    ways: list[str] = []
    for option, candidates in values.items():
        fitting = (f"{option}={v!r}" for v in candidates if fits(option, v))
        ways += islice(fitting, 1)
    return ways


def _rescaled(planner: _Planner, changed: Problem) -> _Planner:
    """The planner of a changed problem, its chunks in proportion and not compiled."""
    size = changed.compute.microbatch_size or planner.microbatch_size
    before = _chunk_length(planner.problem, planner.microbatch_size)
    scaled = planner.forming.bytes * _chunk_length(changed, size) // before
    forming = planner.forming._replace(bytes=scaled)
    return planner._replace(problem=changed, forming=forming)


def _halvings(start: int, least: int) -> Iterator[int]:
    while start // 2 >= least:
        start //= 2
        yield start
