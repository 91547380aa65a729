"""What a curvature takes that goes through the examples and keeps no gradients."""

from collections.abc import Callable

from woodfisher_jax.rows.budget import (
    MICROBATCH_SIZE,
    MemoryLimitError,
    budget_of,
    vectors_bytes,
)
from woodfisher_jax.rows.needs import Needs, Passes, Phase
from woodfisher_jax.settings import Settings
from woodfisher_jax.trees.blocks import FlatOrder


def plan_passes(
    passes: Callable[[int], Passes], order: FlatOrder, settings: Settings
) -> Needs:
    """Plans a step whose curvature keeps no gradients.

    Args:
        passes: What it takes with so many examples at once.
        order: The flat order of the prunable tensors.
        settings: Of the step.

    Raises:
        MemoryLimitError: If it does not fit in memory.
    """
    budget = budget_of(settings)
    static = budget.used + vectors_bytes(order, settings, budget)
    room = (budget.limit - static) // 2
    most = settings.microbatch_size or MICROBATCH_SIZE
    found = passes(most)
    while settings.microbatch_size is None and found.bytes > room and most > 1:
        most = max(1, min(most // 2, int(room / found.bytes * most)))
        found = passes(most)
    after = static + found.bytes_after if budget.shared else static
    phases = [Phase("gradients", found.flops, 0, static + found.bytes)]
    if found.bytes_after:
        phases.append(Phase("curvature", found.flops_after, 0, after))
    needs = Needs(
        store="",
        store_dtype=settings.store_dtype,
        store_bytes=0,
        passes=1,
        keep_factors=False,
        microbatch_size=most,
        num_weights=order.size,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        blocks=(),
        phases=tuple(phases),
        limit_bytes=budget.limit,
    )
    taken, limit = needs.peak_bytes, budget.limit
    if budget.host_used + found.bytes_after > budget.host_limit:
        taken, limit = budget.host_used + found.bytes_after, budget.host_limit
    if taken > limit:
        raise MemoryLimitError(
            f"this pruning step needs {taken / 1e9:.3g} GB of memory, and the limit is "
            f"{limit / 1e9:.3g} GB ({order.size:,} weights, microbatch_size={most}). "
            + ("Take a smaller microbatch_size, leave" if most > 1 else "Leave")
            + " out the widest layers (prunable), or choose woodfisherblock, whose "
            "block_size bounds its memory"
        )
    return needs
