"""The page of several runs: accuracy against sparsity, over seeds."""

from collections.abc import Callable
from itertools import groupby

from woodfisher_jax.report.charts import Series, line_chart
from woodfisher_jax.report.comparison import (
    Comparison,
    Group,
    Spread,
    just_pruned,
    number_at,
    spread,
)
from woodfisher_jax.report.page import (
    Html,
    details,
    element,
    joined,
    page,
    paragraph,
    table,
)
from woodfisher_jax.report.quantities import (
    NONE,
    counted,
    duration,
    fixed,
    percent,
    scaled,
)

Measure = Callable[[Group], Spread]


def comparison_page(found: Comparison) -> str:
    """The page of several runs.

    Args:
        found: Runs of one data set, grouped.
    """
    data = found.records[0].config["data"]["name"]
    finished = [record for group in found.groups for record in group.records]
    head = [
        paragraph(
            f"{counted(len(finished), 'finished run')} in "
            f"{counted(len(found.groups), 'group')}; runs that differ in their seed "
            "alone are one group. Given are the mean over the seeds and, after ±, the "
            "standard deviation of one run."
            if finished
            else "None of them has finished."
        ),
        *_warnings(found),
    ]
    sections = []
    if found.groups:
        sections.append(("Accuracy against sparsity", _charts(found)))
        sections.append(("Groups", _groups(found)))
    sections.append(("Runs", _runs(found)))
    return page(f"{data}: {len(found.records)} runs compared", head, sections)


def _warnings(found: Comparison) -> list[Html]:
    parts = []
    if found.unfinished:
        names = ", ".join(str(record.folder) for record in found.unfinished)
        text = f"Not finished, and left out of all means: {names}."
        parts.append(paragraph(text, kind="warning"))
    if found.repeated:
        names = ", ".join(str(record.folder) for record in found.repeated)
        text = f"Left out, since a run of the same config and seed is there: {names}."
        parts.append(paragraph(text, kind="warning"))
    models = {record.config["model"]["name"] for record in found.records}
    if len(models) > 1:
        text = f"The runs are of several models: {', '.join(sorted(models))}."
        parts.append(paragraph(text, kind="warning"))
    return parts


def _final(group: Group) -> Spread:
    return group.spread("final", "top1")


def _pruned(group: Group) -> Spread:
    return spread([just_pruned(record) for record in group.records])


def _charts(found: Comparison) -> Html:
    records = [record for group in found.groups for record in group.records]
    dense = spread([number_at(record, "dense", "top1") for record in records]).mean
    charts = [
        _chart(found, title, measure, dense)
        for title, measure in (
            ("At the end of the run", _final),
            ("Just after the last pruning step", _pruned),
        )
        if any(measure(group).mean is not None for group in found.groups)
    ]
    bars = "Bars are one standard deviation over the seeds to either side."
    return joined([element("div", *charts, class_="charts"), paragraph(bars)])


def _chart(
    found: Comparison, title: str, measure: Measure, dense: float | None
) -> Html:
    series = []
    curves = groupby(found.groups, lambda group: group.series)
    for style, (name, groups) in enumerate(curves):
        points = [
            (100 * (group.spread("sparsity").mean or 0.0), measure(group))
            for group in groups
        ]
        points = [(x, y) for x, y in points if y.mean is not None]
        series.append(
            Series(
                name,
                [x for x, _ in points],
                [y.mean or 0.0 for _, y in points],
                style,
                kind="points",
                errors=[y.deviation or 0.0 for _, y in points],
            )
        )
    return line_chart(
        title,
        series,
        x_label="prunable weights that are zero, %",
        y_label="top-1 on the test split, %",
        reference=("dense, mean", dense) if dense is not None else None,
    )


def plus_minus(found: Spread, digits: int = 2) -> str:
    """Mean ± standard deviation."""
    mean = fixed(found.mean, digits)
    if found.deviation is None:
        return mean
    return f"{mean} ± {fixed(found.deviation, digits)}"


def _groups(found: Comparison) -> Html:
    rows = [
        [
            group.series,
            percent(group.spread("sparsity").mean),
            str(len(group.records)),
            plus_minus(group.spread("dense", "top1")),
            plus_minus(_pruned(group)),
            plus_minus(_final(group)),
            plus_minus(group.spread("final", "loss"), 4),
            scaled(group.spread("macs", "sparse").mean),
            duration(group.spread("seconds_total").mean),
        ]
        for group in found.groups
    ]
    headers = ["", "sparsity", "seeds", "dense top-1, %", "just pruned, %"]
    headers += ["final, %", "final loss, nats", "MACs", "time"]
    caption = "Means over the seeds. MACs: multiply-accumulates for one image."
    return table(headers, rows, caption=caption)


def _runs(found: Comparison) -> Html:
    rows = [
        [
            str(record.folder),
            record.method,
            str(record.config["seed"]),
            percent(number_at(record, "sparsity")),
            fixed(number_at(record, "dense", "top1")),
            fixed(just_pruned(record)),
            fixed(number_at(record, "final", "top1")),
            duration(number_at(record, "seconds_total"))
            if record.finished
            else "not finished",
        ]
        for record in found.records
    ]
    headers = ["run", "method", "seed", "sparsity", "dense top-1, %"]
    headers += ["just pruned, %", "final, %", "time"]
    caption = f"Every run; {NONE} where there is no figure."
    return details(f"All {len(rows)} runs", table(headers, rows, caption=caption))
