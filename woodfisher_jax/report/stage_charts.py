"""The pruning steps of a run: their table, saliencies, the loss foreseen and found."""

from collections.abc import Sequence
from typing import Any

from woodfisher_jax.methods import METHODS
from woodfisher_jax.report.charts import Series, known_points, line_chart, log_histogram
from woodfisher_jax.report.page import Html, details, element, joined, paragraph, table
from woodfisher_jax.report.quantities import duration, fixed, percent, significant
from woodfisher_jax.report.record import RunRecord


def steps(name: str, record: RunRecord) -> Html:
    """A line a pruning step, with the accuracy on both sides of it."""
    rows = [
        [
            f"{stage['pruner']} {number}",
            f"{stage['epoch']:g}",
            f"{stage['step']:,}",
            percent(stage.get("target_sparsity")),
            percent(stage.get("sparsity")),
            fixed(stage.get("top1_before")),
            fixed(stage.get("top1_after")),
            duration(stage.get("seconds")),
        ]
        for number, stage in enumerate(record.results["stages"], 1)
    ]
    headers = ["", "epoch", "step", "target", "sparsity", "top-1 before, %"]
    headers += ["after, %", "time"]
    return table(headers, rows, caption=f"Pruning steps of {name}.")


def saliencies(record: RunRecord) -> Html:
    """Histograms of the statistic, of the weights that stayed and those that went."""
    stages = record.results["stages"]
    charts = [
        _histogram(record, stage, number)
        for number, stage in enumerate(stages, 1)
        if stage.get("saliency_histogram")
    ]
    if not charts:
        return paragraph(
            "No pruning step of this run has recorded the saliencies of its weights."
            if stages
            else "No pruning step has been done."
        )
    shown, rest = charts, []
    if len(charts) > 3:
        shown, rest = [charts[0], charts[-1]], charts[1:-1]
    parts = [
        paragraph(
            "Weights that a pruning step could take, by the statistic that decides. "
            "Where the two overlap by more than a bin, something else decides as well: "
            "a share of each layer, a pattern, or what weights cost."
        ),
        element("div", *shown, class_="charts"),
    ]
    if rest:
        label = f"The {len(rest)} steps between"
        parts.append(details(label, element("div", *rest, class_="charts")))
    return joined(parts)


def _histogram(record: RunRecord, stage: dict[str, Any], number: int) -> Html:
    found, pruner = stage["saliency_histogram"], record.config[stage["pruner"]]
    by_size = METHODS[pruner["method"]].curvature is None
    kept, removed = found["zeros"]
    remark = ""
    if kept or removed:
        remark = f"Without a saliency: {removed:,} that went, {kept:,} that stayed."
    return log_histogram(
        f"{stage['pruner']} {number}, to {percent(stage['sparsity'])}",
        found["low"],
        found["high"],
        {"removed": found["removed"], "kept": found["kept"]},
        x_label="magnitude |w|" if by_size else "saliency, nats",
        y_label="weights",
        remark=remark,
    )


# ------------------------------------------------------------------------- the model


def losses(record: RunRecord) -> Html:
    """What the quadratic model predicted of the loss, and what came."""
    stages = record.results["stages"]
    if not stages:
        return paragraph("No pruning step has been done.")
    predicted = [s for s in stages if s.get("predicted_loss_increase") is not None]
    parts = []
    if not predicted:
        parts.append(_why_not_predicted(record))
    charts = _predictions(stages) if len(predicted) > 1 else []
    charts += [
        _loss_path(stage, number)
        for number, stage in enumerate(stages, 1)
        if stage.get("loss_path")
    ]
    if charts:
        parts.append(element("div", *charts[:3], class_="charts"))
    if charts[3:]:
        more = element("div", *charts[3:], class_="charts")
        parts.append(details(f"{len(charts[3:])} more charts", more))
    parts.append(_loss_table(stages))
    return joined(parts)


def _why_not_predicted(record: RunRecord) -> Html:
    methods = [record.config[s["pruner"]]["method"] for s in record.results["stages"]]
    if all(METHODS[method].curvature is None for method in methods):
        name = record.method
        return paragraph(f"{name} has no model of the loss, so nothing was predicted.")
    return paragraph(
        "The increase of the loss was not predicted in this run; with ",
        element("code", "--config.prune.diagnostics=True"),
        " it is.",
    )


def increase(stage: dict[str, Any]) -> float | None:
    """How much the loss rose on the training examples it was measured on."""
    before, after = stage.get("train_loss_before"), stage.get("train_loss_after")
    return None if before is None or after is None else after - before


def _predictions(stages: Sequence[dict[str, Any]]) -> list[Html]:
    series = []
    for style, (name, values) in enumerate(
        {
            "measured": [increase(stage) for stage in stages],
            "predicted": [stage.get("predicted_loss_increase") for stage in stages],
        }.items()
    ):
        xs, ys = known_points(range(1, len(values) + 1), values)
        if xs:
            series.append(Series(name, xs, ys, style, kind="points"))
    title, y_label = "Increase of the loss", "nats an example"
    return [line_chart(title, series, x_label="pruning step", y_label=y_label)]


def _loss_path(stage: dict[str, Any], number: int) -> Html:
    path = stage["loss_path"]
    names = {
        "train": "training",
        "quadratic": "quadratic model",
        "with_slope": "with the slope",
    }
    series = []
    for style, (key, name) in enumerate(names.items()):
        xs, ys = known_points(path["fractions"], path[key])
        if xs:
            series.append(Series(name, xs, ys, style))
    return line_chart(
        f"On the way, {stage['pruner']} {number}",
        series,
        x_label="share of the way from the old weights to the new",
        y_label="loss, nats an example",
    )


def _loss_table(stages: Sequence[dict[str, Any]]) -> Html:
    columns = {
        "loss before": [s.get("train_loss_before") for s in stages],
        "after": [s.get("train_loss_after") for s in stages],
        "increase": [increase(s) for s in stages],
        "predicted": [s.get("predicted_loss_increase") for s in stages],
        "its linear term": [s.get("gradient_term") for s in stages],
        "sum of saliencies": [s.get("saliency_sum") for s in stages],
        "kept as by magnitude": [s.get("magnitude_overlap") for s in stages],
    }
    columns = {k: v for k, v in columns.items() if any(x is not None for x in v)}
    rows = [
        [f"{stage['pruner']} {n + 1}", *(significant(v[n]) for v in columns.values())]
        for n, stage in enumerate(stages)
    ]
    caption = (
        "Loss on training examples, in nats an example, on the batch-norm statistics "
        "of before the step. The sum of saliencies is the increase if every weight "
        "had gone alone."
    )
    return table(["", *columns], rows, caption=caption)
