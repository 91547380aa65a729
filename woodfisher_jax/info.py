"""What a pruning step did: figures, and wall time of its phases."""

import contextlib
import contextvars
import html
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from woodfisher_jax.equations.damping import ChosenDamping
from woodfisher_jax.rows.needs import Needs


class PruneWarning(UserWarning):
    """A step was taken, but on no information, or with nothing left of a tensor."""


_SILENT = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Leaves what steps warn of to whoever reads ``info.warnings``.

    In this thread alone, which the filters of ``warnings`` do not tell from others.
    """
    before = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(before)


def is_unwarned() -> bool:
    """Whether this is within :func:`unwarned`, where an outer call looks itself."""
    return _SILENT.get()


class Trial(NamedTuple):
    """A damping that was tried, and what held-out examples measured after its step."""

    damping: float
    measured: float


MOST_TENSORS = 20
"""Rows of a printed table; the attribute has all tensors."""


MOST_EMPTY = 4
"""Layers in a printed line; the attribute has all of them."""


class PruneInfo(NamedTuple):
    """What one pruning step did; ``print(info)`` shows a table.

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
        objective: What predicted increases are of: "loss", or "distance" where each
            gradient has a target: ``E (y - gᵀδw)² / 2``.
        outputs_error: Of :func:`woodfisher_jax.prune_outputs`, over inputs that were
            drawn as for one more stage: ``E ‖f(w, x) - f(w₀, x)‖² / E ‖f(w₀, x)‖²``;
            else None.
        predicted_loss_increase: ``ḡᵀδw + δwᵀFδw / 2`` of the step taken, pruned weights
            included, by the method's own curvature; None without diagnostics.
        gradient_term: ``ḡᵀδw`` in it.
        measured_loss_increase: Mean loss of the curvature's samples after the step,
            minus that before it; None without diagnostics, or with targets.
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
        empty_outputs: From path to how many outputs of a layer, such as neurons or
            filters, have no weight left, so that they are the same for all inputs;
            layers without such outputs, or whose axes are not known, are left out.
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
    objective: str = "loss"
    outputs_error: float | None = None
    predicted_loss_increase: float | None = None
    gradient_term: float | None = None
    measured_loss_increase: float | None = None
    magnitude_overlap: float | None = None
    magnitude_correlation: float | None = None
    fisher_trace: dict[str, float] | None = None
    untouched: dict[str, float] | None = None
    empty_outputs: dict[str, int] | None = None
    revived: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall time of all phases."""
        return self.seconds_gradients + self.seconds_curvature + self.seconds_update

    def __repr__(self) -> str:
        """The outcome in one line."""
        warned = f", warnings={len(self.warnings)}" if self.warnings else ""
        return (
            f"PruneInfo(sparsity={self.sparsity:.4f}, nonzero={self.nonzero}, "
            f"prunable={self.prunable}, seconds={self.seconds:.2f}{warned})"
        )

    def __str__(self) -> str:
        """A table: sparsity of each tensor, loss, seconds, warnings."""
        levels, more = _levels(self)
        width = max((len(path) for path, _ in levels), default=0)
        lines = [f"{path:{width}}  {100 * level:6.2f} %" for path, level in levels]
        facts = [f"{name:9}  {text}" for name, text in _facts(self)]
        return "\n".join([_headline(self), "", *lines, *more, "", *facts])

    def _repr_html_(self) -> str:
        """The same for a notebook, in its colours."""
        levels, more = _levels(self)
        rows = [_html_row(path, level) for path, level in levels]
        rows += [
            f'<tr><td colspan="3" style="text-align:left">{line}</td></tr>'
            for line in more
        ]
        facts = [f"<b>{name}</b> {html.escape(text)}" for name, text in _facts(self)]
        return (
            f"<p>{_headline(self)}</p><table>{''.join(rows)}</table>"
            f"<p>{'<br>'.join(facts)}</p>"
        )


def _headline(info: PruneInfo) -> str:
    return (
        f"{100 * info.sparsity:.2f} % sparse: {info.nonzero:,} of {info.prunable:,} "
        "prunable weights left"
    )


def _levels(info: PruneInfo) -> tuple[list[tuple[str, float]], list[str]]:
    """The tensors of the table with their sparsities, and a line on the others."""
    levels = list(info.sparsity_by_path.items())
    if len(levels) <= MOST_TENSORS:
        return levels, []
    others = [level for _, level in levels[MOST_TENSORS - 1 :]]
    line = (
        f"{len(others)} more, {100 * min(others):.2f} to {100 * max(others):.2f} %: "
        "info.sparsity_by_path"
    )
    return levels[: MOST_TENSORS - 1], [line]


def _facts(info: PruneInfo) -> list[tuple[str, str]]:
    """What is known beside the sparsities: name and text."""
    facts = []
    # Each stage predicts from what the one before has left: their sum is no rise.
    if info.outputs_error is None:
        facts += _predicted(info)
    else:
        text = f"outputs differ by {info.outputs_error:.3g} (relative square)"
        facts.append(("measured", text))
    if info.measured_loss_increase is not None:
        text = f"loss changes by {info.measured_loss_increase:+.3g} on the samples"
        facts.append(("measured", text))
    if info.trials:
        best = info.trials[-1]
        text = f"{best.measured:.4g} on held_out (damping {best.damping:.3g})"
        facts.append(("measured", text))
    if info.macs is not None:
        facts.append(("MACs", f"{info.macs / 1e6:.4g} M an example"))
    phases = [
        f"{name} {seconds:.2f}"
        for name, seconds in (
            ("gradients", info.seconds_gradients),
            ("curvature", info.seconds_curvature),
            ("update", info.seconds_update),
        )
    ]
    if info.empty_outputs:
        facts.append(("empty", emptied_line(info.empty_outputs)))
    facts.append(("seconds", f"{info.seconds:.2f} ({', '.join(phases)})"))
    if info.num_samples:
        facts.append(("samples", f"{info.num_samples:,} gradients"))
    return facts + [("warning", text) for text in info.warnings]


def _predicted(info: PruneInfo) -> list[tuple[str, str]]:
    """By how much the objective changes, by what the statistic and the step say."""
    what = "loss" if info.objective == "loss" else "squared distance from targets / 2"
    return [
        ("predicted", f"{what} changes by {change:+.3g} ({by})")
        for change, by in (
            (info.saliency_sum, "sum of saliencies"),
            (info.predicted_loss_increase, "the step as a whole"),
        )
        if change is not None
    ]


def emptied_line(outputs: dict[str, int]) -> str:
    """Outputs without a weight in one line, the most first."""
    most = sorted(outputs.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{path} {number:,}" for path, number in most[:MOST_EMPTY])
    more = len(most) - MOST_EMPTY
    others = f" and {more} layers more: info.empty_outputs" if more > 0 else ""
    return f"outputs without a weight left: {shown}{others}"


def _html_row(path: str, level: float) -> str:
    bar = (
        '<div style="width:10em;background:rgba(128,128,128,.25)">'
        f'<div style="width:{100 * level:.1f}%;height:.7em;background:currentColor;'
        'opacity:.5"></div></div>'
    )
    return (
        f'<tr><td style="text-align:left">{html.escape(path)}</td><td>{bar}</td>'
        f"<td>{100 * level:.2f} %</td></tr>"
    )


SUMS = (
    "seconds_gradients",
    "seconds_curvature",
    "seconds_update",
    "saliency_sum",
    "predicted_loss_increase",
    "gradient_term",
    "measured_loss_increase",
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


def warn_of_texts(texts: Sequence[str], stacklevel: int) -> None:
    """Warns of sentences, unless :func:`is_unwarned`.

    Args:
        texts: That ``info.warnings`` has as well.
        stacklevel: As for :func:`warn_of`.
    """
    for text in () if _SILENT.get() else texts:
        warnings.warn(text, PruneWarning, stacklevel=stacklevel + 1)


def with_warnings(infos: list[PruneInfo], texts: Sequence[str]) -> list[PruneInfo]:
    """The infos of several steps with what was warned of before they started."""
    return [info._replace(warnings=(*texts, *info.warnings)) for info in infos]


def warn_of(infos: Sequence[PruneInfo], stacklevel: int) -> None:
    """Warns once of what several steps of one call have found, with how often.

    Args:
        infos: Of the steps.
        stacklevel: Of the line that is to blame, as for ``warnings.warn`` in the
            function that calls this one.
    """
    if _SILENT.get():
        return
    counts = Counter(text for info in infos for text in info.warnings)
    for text, number in counts.items():
        often = f"in {number} of {len(infos)} steps: " if len(infos) > 1 else ""
        warnings.warn(often + text, PruneWarning, stacklevel=stacklevel + 1)


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
