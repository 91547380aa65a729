"""Accuracy, sparsity and loss along a run, and its pruning steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from woodfisher_jax.report.elements import figures, tables
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import (
    PERCENT,
    POSITIVE,
    Bars,
    Panel,
    Picture,
    Series,
)
from woodfisher_jax.report.elements.markup import Html, details, paragraph
from woodfisher_jax.report.elements.quantities import percent
from woodfisher_jax.report.elements.tables import layer_name
from woodfisher_jax.report.record import Nested, RunRecord


def pictures(record: RunRecord) -> dict[str, Picture]:
    """The accuracy by the name of its file; {} before it was first measured.

    ``accuracy``, or ``comparison`` with the runs that it is compared with.

    Args:
        record: The run.
    """
    return {_file(record): _accuracy(record)} if _evaluated_rows(record) else {}


def section(record: RunRecord, drawn: Mapping[str, Picture]) -> Html:
    """Accuracy, sparsity and loss over the epochs, and the pruning steps.

    Args:
        record: The run.
        drawn: Its figures, those of :func:`pictures` among them.
    """
    runs = _evaluated_rows(record)
    if not runs:
        return paragraph("No epoch and no pruning step has ended yet.")
    shown = [drawn[_file(record)]]
    losses = [
        Series(name, _column(rows, "epoch"), _column(rows, "loss"), style)
        for style, (name, rows) in enumerate(runs.items())
    ]
    parts = []
    if _at_one_epoch(runs):
        parts.append(paragraph("Nothing was trained here: all is at one epoch."))
    elif any(one.points for one in losses):
        panel = Panel("test loss, nats an image", losses, POSITIVE)
        shown.append(figures.lines("Loss", "epoch", [panel]))
    parts.insert(0, html.figures(shown))
    for name, one in record.runs.items():
        if one.results["stages"]:
            caption = f"Pruning steps of {name}"
            steps = html.table(
                *tables.steps(one.results["stages"]), caption=f"{caption}."
            )
            parts.append(steps if one is record else details(caption, steps))
    if found := _findings(record.results["stages"]):
        parts.append(found)
    return html.joined(parts)


def _findings(stages: Sequence[Nested]) -> Html | None:
    """Weights without a gradient and outputs without weights, by the last step."""
    last = stages[-1] if stages else {}
    shares, outputs = last.get("untouched") or {}, last.get("empty_outputs") or {}
    rows = [
        [layer_name(path), percent(shares.get(path)), str(outputs.get(path, 0))]
        for path in {**shares, **outputs}
        if shares.get(path) or outputs.get(path)
    ]
    if not rows:
        return None
    headers = ["", "weights without a gradient", "outputs without a weight"]
    caption = "Before and after the last pruning step."
    return details(
        "Layers without gradients or weights",
        html.table(headers, rows, caption=caption),
    )


def _file(record: RunRecord) -> str:
    return "comparison" if record.compared else "accuracy"


def _accuracy(record: RunRecord) -> Picture:
    """Top-1 and sparsity over the epochs; bars where all rows are of one epoch."""
    runs, label = _evaluated_rows(record), "top-1 on the test split, %"
    if _at_one_epoch(runs):
        first, *_ = runs.values()
        names = [
            f"pruned, {percent(row.get('sparsity'), 1)}"
            if row["event"] == "prune"
            else row["event"]
            for row in first
        ]
        bars = [
            Bars(name, _column(rows, "top1")[: len(first)], "marker" if n else "bar")
            for n, (name, rows) in enumerate(runs.items())
        ]
        texts = [f"{row['top1']:.2f}" for row in first]
        return figures.rows("Accuracy", label, names, bars, texts, PERCENT[1])
    top1, levels = [], []
    for style, (name, rows) in enumerate(runs.items()):
        epochs = _column(rows, "epoch")
        pruned = [row for row in rows if row["event"] == "prune"]
        top1.append(Series(name, epochs, _column(rows, "top1"), style))
        if pruned:
            at, heights = _column(pruned, "epoch"), _column(pruned, "top1")
            name_then = f"{name}, just pruned"
            top1.append(Series(name_then, at, heights, style, "markers"))
        sparsity = [100 * (row.get("sparsity") or 0.0) for row in rows]
        levels.append(Series(name, epochs, sparsity, style, "steps"))
    dense = record.results["dense"]
    reference = ("dense", dense["top1"]) if dense else None
    panels = [
        Panel(label, top1, PERCENT, reference),
        Panel("prunable weights that are zero, %", levels, PERCENT),
    ]
    picture = figures.lines("Accuracy and sparsity", "epoch", panels)
    picture.figure.axes[1].set_ylim(PERCENT)
    return picture


def _evaluated_rows(record: RunRecord) -> dict[str, list[Nested]]:
    """From method to the rows that have an accuracy; methods with some."""
    runs = {
        name: [row for row in one.rows if row.get("top1") is not None]
        for name, one in record.runs.items()
    }
    return {name: rows for name, rows in runs.items() if rows}


def _at_one_epoch(runs: dict[str, list[Nested]]) -> bool:
    return len({row["epoch"] for rows in runs.values() for row in rows}) == 1


def _column(rows: Sequence[Nested], key: str) -> list[Any]:
    return [row.get(key) for row in rows]
