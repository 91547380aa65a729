"""Saliencies of the weights that each pruning step removed and kept."""

from woodfisher_jax.report.elements import figures
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import Picture
from woodfisher_jax.report.elements.markup import Html, details, paragraph
from woodfisher_jax.report.elements.quantities import percent
from woodfisher_jax.report.record import Nested, RunRecord


def section(record: RunRecord) -> Html:
    """Histograms of the saliency, of the weights removed and kept at each step.

    Args:
        record: The run.
    """
    stages = record.results["stages"]
    shown = [
        _histogram(stage, number)
        for number, stage in enumerate(stages, 1)
        if stage.get("saliency_histogram")
    ]
    if not shown:
        return paragraph(
            "No pruning step of this run has recorded the saliencies of its weights."
            if stages
            else "No pruning step has been done."
        )
    between = shown[1:-1] if len(shown) > 3 else []
    if between:
        shown = [shown[0], shown[-1]]
    parts = [
        paragraph(
            "Weights that a pruning step could remove, by the statistic that ranks "
            "them. Where the two histograms overlap by more than a bin, something else "
            "decides as well: a share of each layer, a pattern, or the cost of weights."
        ),
        html.figures(shown),
    ]
    if between:
        label = f"The {len(between)} steps between"
        parts.append(details(label, html.figures(between)))
    return html.joined(parts)


def _histogram(stage: Nested, number: int) -> Picture:
    kept, removed = stage["saliency_histogram"]["zeros"]
    remark = ""
    if kept or removed:
        remark = f"Without a saliency: {removed:,} removed, {kept:,} kept."
    title = f"{stage['pruner']} {number}, to {percent(stage['sparsity'])}"
    # Memory is planned for every statistic but the magnitude.
    label = "saliency, nats" if "store" in stage else "magnitude |w|"
    histogram = stage["saliency_histogram"]
    return figures.histograms(title, label, histogram)._replace(remark=remark)
