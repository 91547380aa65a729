"""The loss that each pruning step cost, predicted and measured."""

import math
from collections.abc import Mapping, Sequence

from woodfisher_jax.report.elements import figures
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import POSITIVE, Panel, Picture, Series
from woodfisher_jax.report.elements.markup import Html, details, paragraph
from woodfisher_jax.report.elements.quantities import counted, significant
from woodfisher_jax.report.record import Nested, RunRecord

_FILES = "loss_path_"


def pictures(record: RunRecord) -> dict[str, Picture]:
    """The loss along each step by the name of its file: ``loss_path_N`` of step N.

    Args:
        record: The run.
    """
    return {
        f"{_FILES}{number}": _loss_path(
            f"Loss along step {number} ({stage['pruner']})", stage["loss_path"]
        )
        for number, stage in enumerate(record.results["stages"], 1)
        if stage.get("loss_path")
    }


def section(record: RunRecord, drawn: Mapping[str, Picture]) -> Html:
    """Increase of the loss as the quadratic model predicted it, and as measured.

    Args:
        record: The run.
        drawn: Its figures, those of :func:`pictures` among them.
    """
    stages = record.results["stages"]
    if not stages:
        return paragraph("No pruning step has been done.")
    predicted = [stage.get("predicted_loss_increase") for stage in stages]
    linear = [_increase(stage, "train_loss_predicted") for stage in stages]
    models = {"predicted": predicted, "by linear outputs": linear}
    known = {
        name: values
        for name, values in models.items()
        if any(value is not None for value in values)
    }
    parts, shown = [], []
    if not known:
        parts.append(
            paragraph(
                "The increase of the loss was not predicted in this run; ",
                html.element("code", "--config.prune.diagnostics=True"),
                " predicts it.",
            )
        )
    if known and len(stages) > 1:
        steps = range(1, len(stages) + 1)
        series = [
            Series(name, steps, values, style, "points")
            for style, (name, values) in enumerate(
                {"measured": list(map(_increase, stages)), **known}.items()
            )
        ]
        panel = Panel("nats an example", series, figures.ANY)
        shown.append(figures.lines("Increase of the loss", "pruning step", [panel]))
    shown += [picture for name, picture in drawn.items() if name.startswith(_FILES)]
    if shown:
        parts.append(html.figures(shown[:3]))
    if shown[3:]:
        label = counted(len(shown[3:]), "more figure")
        parts.append(details(label, html.figures(shown[3:])))
    return html.joined([*parts, _loss_table(stages)])


def _loss_path(title: str, path: Nested) -> Picture:
    """Loss from the weights before a pruning step to those after it, and its model."""
    xs = path["fractions"]
    series = [
        Series("training", xs, path["train"], 0),
        Series("quadratic model", xs, path["quadratic"], 1),
        Series("with the slope", xs, path["with_slope"], 2),
    ]
    # A model of the loss can be below zero, where no loss is.
    lowest = min((y for one in series for _, y in one.points), default=0.0)
    panels = [Panel("loss, nats an example", series, (min(lowest, 0.0), math.inf))]
    if path["test"]:
        test = Series("test", xs, path["test"], 3)
        panels.append(Panel("test loss, nats an example", [test], POSITIVE))
    label = "share of the way from old to new weights"
    return figures.lines(title, label, panels, (0.0, 1.0))


def _increase(stage: Nested, name: str = "train_loss_after") -> float | None:
    """Increase of the loss on the training examples that it was measured on."""
    before, after = stage.get("train_loss_before"), stage.get(name)
    return None if before is None or after is None else after - before


def _loss_table(stages: Sequence[Nested]) -> Html:
    columns = {
        "loss before": [s.get("train_loss_before") for s in stages],
        "after": [s.get("train_loss_after") for s in stages],
        "increase": [_increase(s) for s in stages],
        "predicted": [s.get("predicted_loss_increase") for s in stages],
        "its linear term": [s.get("gradient_term") for s in stages],
        "predicted by linear outputs": [
            _increase(s, "train_loss_predicted") for s in stages
        ],
        "sum of saliencies": [s.get("saliency_sum") for s in stages],
        "kept as by magnitude": [s.get("magnitude_overlap") for s in stages],
    }
    columns = {k: v for k, v in columns.items() if any(x is not None for x in v)}
    rows = [
        [f"{stage['pruner']} {n + 1}", *(significant(v[n]) for v in columns.values())]
        for n, stage in enumerate(stages)
    ]
    caption = (
        "Loss on training examples, in nats an example, with the batch-norm statistics "
        "from before the step. The sum of saliencies is the increase if every weight "
        "were removed alone. Linear outputs: the loss where the derivative of the "
        "outputs leads."
    )
    return html.table(["", *columns], rows, caption=caption)
