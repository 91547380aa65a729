"""What a pruning step did: figures, and wall time of its phases."""

import time
from itertools import pairwise
from typing import Any, NamedTuple

from woodfisher_jax.equations.damping import ChosenDamping
from woodfisher_jax.rows.needs import Needs


class PruneWarning(UserWarning):
    """A step was taken, but on no information, or with nothing left of a tensor."""


class Trial(NamedTuple):
    """A damping that was tried, and what held-out examples measured after its step."""

    damping: float
    measured: float


class PruneInfo(NamedTuple):
    """What one pruning step did.

    With recomputations, sparsity and MACs are those at the end, times and predicted
    increases are sums, and the comparisons are those of the last recomputation.

    Attributes:
        sparsity: Fraction of the prunable weights that are zero now.
        nonzero: How many prunable weights stay.
        prunable: How many prunable weights there are.
        sparsity_by_path: Sparsity of each prunable parameter.
        num_samples: N, gradients that the curvature was estimated from; 0 for methods
            without one.
        seconds_gradients: Wall time of the gradients; with store="recompute" they are
            formed within the other phases and count there.
        seconds_curvature: Wall time of the curvature's diagonal, scores and masks.
        seconds_update: Wall time of the update of the remaining weights.
        needs: What the step was planned to take; None without a curvature.
        dampings: For damping="auto", what was chosen for the statistic and, with the
            joint update, for the update; else None.
        trials: Of :func:`woodfisher_jax.prune_searched`, from the highest loss to the
            lowest; else None.
        swap_losses: With swaps, the model loss before the first round and after each.
        macs: Multiply-accumulates of one example now; None without a FLOP target.
        saliency_histogram: Counts of weights by their statistic, see
            :func:`woodfisher_jax.selection.diagnostics.saliency_histogram`; None where
            the joint update only repairs, since nothing goes and none is ranked.
        saliency_sum: Sum of the statistic over the weights that went, with -γ/2 for
            methods of first order: the loss increase if single weights were removed
            independently; None for magnitudes and for such a repair.
        predicted_loss_increase: ``ḡᵀδw + δwᵀFδw / 2`` of the step taken, pruned weights
            included, by the method's own curvature; None without diagnostics.
        gradient_term: ``ḡᵀδw`` in it.
        magnitude_overlap: Share of the weights that stay which global magnitude would
            keep as well; None without diagnostics.
        magnitude_correlation: Spearman's rank correlation of the statistic and ``|w|``
            over the weights that could go; None without diagnostics.
        fisher_trace: Trace of the undamped Fisher of each parameter; None without
            diagnostics.
        untouched: Share of each parameter's weights that no sample knows anything of:
            without a gradient in any (or, for naivehess, a second derivative); they are
            ranked as if the loss did not depend on them. None where none is ranked, or
            by magnitude.
        empty_outputs: How many outputs of a parameter have no weight left, where there
            are any; the outputs are its last axis.
        revived: How many weights were zero without a mask that says so, and are not
            zero now. A zero is a weight like any other; pass ``masks`` for those that
            are to stay zero.
        warnings: What has been warned of, as a :class:`PruneWarning`.
    """

    sparsity: float
    nonzero: int
    prunable: int
    sparsity_by_path: dict[str, float]
    num_samples: int
    seconds_gradients: float
    seconds_curvature: float
    seconds_update: float
    needs: Needs | None = None
    dampings: tuple[ChosenDamping, ...] | None = None
    trials: tuple[Trial, ...] | None = None
    swap_losses: tuple[float, ...] | None = None
    macs: float | None = None
    saliency_histogram: dict[str, Any] | None = None
    saliency_sum: float | None = None
    predicted_loss_increase: float | None = None
    gradient_term: float | None = None
    magnitude_overlap: float | None = None
    magnitude_correlation: float | None = None
    fisher_trace: dict[str, float] | None = None
    untouched: dict[str, float] | None = None
    empty_outputs: dict[str, int] | None = None
    revived: int = 0
    warnings: tuple[str, ...] = ()


SUMS = (
    "seconds_gradients",
    "seconds_curvature",
    "seconds_update",
    "saliency_sum",
    "predicted_loss_increase",
    "gradient_term",
    "revived",
)
"""Fields that add up over recomputations."""


def joined(infos: list[PruneInfo]) -> PruneInfo:
    """The info of several steps that are one: the last one's, with sums of SUMS.

    Warnings are those of all, once each.
    """
    columns = {name: [getattr(info, name) for info in infos] for name in SUMS}
    sums: dict[str, Any] = {
        name: None if None in values else sum(values)
        for name, values in columns.items()
    }
    said = dict.fromkeys(text for info in infos for text in info.warnings)
    return infos[-1]._replace(**sums, warnings=tuple(said))


class Clock:
    """When the phases of a step have ended; a phase marked again ended later."""

    def __init__(self) -> None:
        self._ends = {"start": time.perf_counter()}

    def mark(self, phase: str) -> None:
        """Ends a phase, and begins the next."""
        self._ends[phase] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Of every phase, in order."""
        found = pairwise(self._ends.items())
        return {name: end - start for (_, start), (name, end) in found}
