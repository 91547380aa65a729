"""The page of one run: what was pruned, what it cost in accuracy, where it went."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from woodfisher_jax.report.charts import (
    Bars,
    Series,
    bar_chart,
    known_points,
    line_chart,
)
from woodfisher_jax.report.metrics import replace_file
from woodfisher_jax.report.page import (
    Html,
    details,
    element,
    joined,
    page,
    paragraph,
    table,
)
from woodfisher_jax.report.page import tiles as tiles_
from woodfisher_jax.report.provenance import costs, latency, origin
from woodfisher_jax.report.quantities import (
    counted,
    duration,
    fixed,
    percent,
    scaled,
    storage,
)
from woodfisher_jax.report.record import RunRecord, read_record
from woodfisher_jax.report.stage_charts import losses, saliencies, steps

NAME = "report.html"

Section = tuple[str, Html]


def write_run_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run from what lies in its folder.

    Args:
        folder: Of the run, finished or not.
        out: The file; default ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        ValueError: If there is no run, or a file of it is damaged.
    """
    out = out or folder / NAME
    replace_file(out, run_page(read_record(folder)))
    return out


def run_page(record: RunRecord) -> str:
    """The page of a run."""
    sections: list[Section] = [
        ("Dense and final", outcome(record)),
        ("Along the run", course(record)),
        ("Layers", layers(record)),
        ("Saliencies", saliencies(record)),
        ("Predicted and measured loss", losses(record)),
        ("Time and memory", costs(record)),
        ("Latency", latency(record)),
        ("Config and origin", origin(record)),
    ]
    title = f"{record.method} on {record.config['data']['name']}"
    return page(f"{title}: {record.folder.absolute().name}", head(record), sections)


# --------------------------------------------------------------------------- the top


def head(record: RunRecord) -> list[Html]:
    """What happened in a sentence, and the figures that matter most."""
    results = record.results
    dense, final = results["dense"] or {}, results["final"] or {}
    macs = results["macs"]
    parts = [paragraph(_summary(record))]
    if not record.finished:
        parts.append(paragraph(_state(record), kind="warning"))
    end, left = "final" if record.finished else "so far", ""
    if results["nonzero"] is not None:
        left = f"{results['nonzero']:,} of {results['prunable']:,} weights left"
    parts.append(
        tiles_(
            [
                ("Top-1, dense", percent_of(dense.get("top1")), _dense_from(record)),
                (f"Top-1, {end}", percent_of(final.get("top1")), "on the test split"),
                ("Sparsity", percent(results["sparsity"]), left),
                (
                    "Multiply-accumulates",
                    scaled(macs["sparse"] if macs else None),
                    f"of {scaled(macs['dense'])}, for one image" if macs else "",
                ),
                ("Time", duration(results["seconds_total"]), "over all starts"),
                ("Peak memory", storage(results["peak_rss_bytes"]), "of the process"),
            ]
        )
    )
    return parts


def percent_of(value: float | None) -> str:
    """A number that is in percent already, unit included."""
    return percent(None if value is None else value / 100)


def _summary(record: RunRecord) -> str:
    results, config = record.results, record.config
    network = f"{config['model']['name']} on {config['data']['name']}"
    if not results["stages"]:
        pruned = "nothing was pruned" if record.finished else "nothing is pruned yet"
        return f"{network}, seed {config['seed']}; {pruned}."
    steps = len(results["stages"])
    how = "in one step" if steps == 1 else f"in {steps} steps"
    return (
        f"{network}, pruned by {record.method} {how} until "
        f"{percent(results['sparsity'])} of its prunable weights were zero; seed "
        f"{config['seed']}."
    )


def _state(record: RunRecord) -> str:
    steps = counted(len(record.results["stages"]), "pruning step")
    reached = "it has not come to the end of an epoch yet"
    if record.rows:
        last = record.rows[-1]
        reached = f"it has come to epoch {last['epoch']:g}, step {last['step']:,}"
    return (
        f"This run has not finished: {reached}, with {steps} done. What follows is how "
        "it stood then; its command, given again with the same --workdir, resumes it."
    )


def _dense_from(record: RunRecord) -> str:
    config = record.config
    if config["init_from"]:
        return f"from {config['init_from']}"
    if not config["dense"]["epochs"]:
        return "initial weights, not trained"
    return f"{config['dense']['epochs']} epochs of training"


def outcome(record: RunRecord) -> Html:
    """Dense against final, and against what the run was compared with."""
    dense = record.results["dense"]
    if dense is None:
        return paragraph("The dense network has not been judged yet.")
    rows = [["dense", percent(0.0), *_judgement(dense), ""]]
    for name, one in {record.method: record, **record.compared}.items():
        final = one.results["final"] or {}
        level = percent(one.results["sparsity"])
        change = _difference(final.get("top1"), dense["top1"])
        rows.append([name, level, *_judgement(final), change])
    headers = ["", "sparsity", "top-1, %", "top-5, %", "loss, nats", "top-1 lost, %"]
    caption = f"On the test split. Dense: {_dense_from(record)}."
    return table(headers, rows, caption=caption)


def _judgement(found: dict[str, Any]) -> list[str]:
    top1, top5 = fixed(found.get("top1")), fixed(found.get("top5"))
    return [top1, top5, fixed(found.get("loss"), 4)]


def _difference(value: float | None, base: float | None) -> str:
    return fixed(None if value is None or base is None else base - value)


# ----------------------------------------------------------------------- the history


def course(record: RunRecord) -> Html:
    """Accuracy, loss and sparsity over the epochs, and the pruning steps."""
    runs = [record, *record.compared.values()]
    if not any(_judged(one) for one in runs):
        return paragraph("No epoch and no pruning step has ended yet.")
    epochs = {row["epoch"] for one in runs for row in _judged(one)}
    charts = over_epochs(runs) if len(epochs) > 1 else [_steps_alone(runs)]
    parts = [element("div", *charts, class_="charts")]
    if len(epochs) == 1:
        parts.append(paragraph("Nothing was trained here: all is at one epoch."))
    if record.results["stages"]:
        parts.append(steps(record.method, record))
    for name, one in record.compared.items():
        if one.results["stages"]:
            parts.append(details(f"Pruning steps of {name}", steps(name, one)))
    return joined(parts)


def over_epochs(runs: Sequence[RunRecord]) -> list[Html]:
    """Charts over the epochs, each run in a style of its own."""
    accuracy, loss, sparsity = [], [], []
    for style, one in enumerate(runs):
        rows = _judged(one)
        epochs = [row["epoch"] for row in rows]
        pruned = [row for row in rows if row["event"] == "prune"]
        line = Series(one.method, epochs, [row["top1"] for row in rows], style)
        accuracy.append(line)
        if pruned:
            at = [row["epoch"] for row in pruned]
            name = f"{one.method}, just pruned"
            heights = [row["top1"] for row in pruned]
            accuracy.append(Series(name, at, heights, style, kind="shapes"))
        at, heights = known_points(epochs, [row.get("loss") for row in rows])
        if at:
            loss.append(line._replace(xs=at, ys=heights))
        level = [100 * (row.get("sparsity") or 0.0) for row in rows]
        sparsity.append(line._replace(ys=level, kind="steps"))
    dense = runs[0].results["dense"]
    charts = [
        line_chart(
            "Accuracy",
            accuracy,
            x_label="epoch",
            y_label="top-1 on the test split, %",
            reference=("dense", dense["top1"]) if dense else None,
        ),
        line_chart(
            "Sparsity",
            sparsity,
            x_label="epoch",
            y_label="prunable weights that are zero, %",
            y_range=(0.0, 100.0),
        ),
    ]
    if loss:
        y_label = "test loss, nats an image"
        charts.insert(1, line_chart("Loss", loss, x_label="epoch", y_label=y_label))
    return charts


def _judged(record: RunRecord) -> list[dict[str, Any]]:
    return [row for row in record.rows if row.get("top1") is not None]


def _steps_alone(runs: Sequence[RunRecord]) -> Html:
    """Accuracy before and after pruning steps, where no epoch lies between them."""
    labels, bars, texts = [], [], []
    for style, one in enumerate(runs):
        rows = _judged(one)
        values = [row["top1"] for row in rows]
        if style == 0:
            labels = [
                row["event"]
                if row["event"] != "prune"
                else f"pruned, {percent(row.get('sparsity'), 1)}"
                for row in rows
            ]
            texts = [f"{value:.2f}" for value in values]
        values = [*values, *[None] * len(labels)][: len(labels)]
        bars.append(Bars(one.method, values, style, "shape" if style else "bar"))
    label = "top-1 on the test split, %"
    return bar_chart("Accuracy", labels, bars, texts, x_label=label, x_max=100.0)


# ------------------------------------------------------------------------- the layers


def layers(record: RunRecord) -> Html:
    """Sparsity and multiply-accumulates of each layer."""
    by_path = record.results["sparsity_by_path"]
    parts, charts = [], []
    if by_path:
        bars = [Bars(record.method, [100 * v for v in by_path.values()])]
        for style, (name, one) in enumerate(record.compared.items(), 1):
            other = one.results["sparsity_by_path"]
            levels = [100 * other[p] if p in other else None for p in by_path]
            bars.append(Bars(name, levels, style, "shape"))
        charts.append(
            bar_chart(
                "Sparsity",
                [layer_name(path) for path in by_path],
                bars,
                [f"{100 * value:.1f}" for value in by_path.values()],
                x_label="weights of the layer that are zero, %",
                x_max=100.0,
            )
        )
    rows, macs = record.results["layers"], record.results["macs"]
    counted = [row for row in rows if row["dense"]]
    if counted:
        charts.append(
            bar_chart(
                "Multiply-accumulates",
                [layer_name(row["path"]) for row in counted],
                [
                    Bars("dense", [row["dense"] for row in counted], kind="outline"),
                    Bars("sparse", [row["sparse"] for row in counted]),
                ],
                [f"{scaled(r['sparse'])} of {scaled(r['dense'])}" for r in counted],
                x_label="for one image",
            )
        )
    if charts:
        parts.append(element("div", *charts, class_="charts"))
    if macs is None:
        why = "could not be counted for this network; the log says why"
        why = why if record.finished else "are counted when the run ends"
        parts.append(paragraph(f"Multiply-accumulates {why}."))
    if rows:
        parts.append(_layer_table(rows))
    return joined(parts)


def layer_name(path: str) -> str:
    """The path of a parameter without what all kernels end in."""
    return path.removesuffix("/kernel")


def _layer_table(rows: Iterable[dict[str, Any]]) -> Html:
    rows = list(rows)
    total: dict[str, Any] = {"path": "all"}
    for key in ("size", "nonzero", "dense", "sparse"):
        total[key] = sum(row[key] for row in rows)
    cells = [
        [
            layer_name(row["path"]),
            f"{row['size']:,}",
            f"{row['nonzero']:,}",
            percent(1 - row["nonzero"] / row["size"]),
            scaled(row["dense"]),
            scaled(row["sparse"]),
        ]
        for row in [*rows, total]
    ]
    headers = ["layer", "weights", "left", "sparsity", "MACs, dense", "sparse"]
    caption = "MACs are multiply-accumulates for one image; sparse: without zeros."
    found = table(headers, cells, caption=caption, marked=[len(rows)])
    return details("Table of the layers", found)
