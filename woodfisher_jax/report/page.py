"""The page of one run: what was pruned, its accuracy, its layers, how to repeat it."""

import math
import pprint
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from woodfisher_jax.report import figures, tables
from woodfisher_jax.report import markup as html
from woodfisher_jax.report.figures import (
    PERCENT,
    POSITIVE,
    Bars,
    Panel,
    Picture,
    Series,
)
from woodfisher_jax.report.markup import Html, details, paragraph
from woodfisher_jax.report.quantities import (
    NONE,
    counted,
    duration,
    fixed,
    percent,
    scaled,
    significant,
    storage,
)
from woodfisher_jax.report.record import Nested, RunRecord, read_record
from woodfisher_jax.report.tables import layer_name
from woodfisher_jax.written_files import replace_file

NAME = "report.html"


def write_page(folder: Path, defaults: Nested, out: Path | None = None) -> Path:
    """Writes the page of a run from what is in its folder.

    Args:
        folder: Of the run, finished or not.
        defaults: The default config, as nested dicts.
        out: The file; default ``report.html`` in the folder, with the plots as PNG
            beside it.

    Returns:
        The file.

    Raises:
        ValueError: If there is no run, or a file of it is damaged.
        MissingExtraError: If matplotlib is not installed.
    """
    record = read_record(folder, defaults)
    drawn = pictures(record)
    if out is None:
        for name, picture in drawn.items():
            picture.png(folder / f"{name}.png")
    out = out or folder / NAME
    replace_file(out, run_page(record, drawn))
    return out


def pictures(record: RunRecord) -> dict[str, Picture]:
    """The figures that are written as PNG too, by the name of their file.

    ``accuracy``, or ``comparison`` with the runs that it is compared with;
    ``sparsity`` of the layers; ``loss_path_N`` of pruning step N.
    """
    drawn = {}
    if _evaluated_rows(record):
        drawn["comparison" if record.compared else "accuracy"] = _accuracy(record)
    if record.results["sparsity_by_path"]:
        drawn["sparsity"] = _layer_sparsity(record)
    for number, stage in enumerate(record.results["stages"], 1):
        if stage.get("loss_path"):
            title = f"Loss along step {number} ({stage['pruner']})"
            drawn[f"loss_path_{number}"] = _loss_path(title, stage["loss_path"])
    return drawn


def run_page(record: RunRecord, drawn: dict[str, Picture]) -> str:
    """The page of a run.

    Args:
        record: The run.
        drawn: Its :func:`pictures`.
    """
    sections = [
        ("Dense and final", _outcome(record)),
        ("Along the run", _course(record, drawn)),
        ("Layers", _layers(record, drawn)),
        ("Saliencies", _saliencies(record)),
        ("Predicted and measured loss", _losses(record, drawn)),
        ("Time and memory", _costs(record)),
        ("Latency", latency(record)),
        ("Config and origin", origin(record)),
    ]
    title = f"{record.method} on {record.config['data']['name']}"
    return html.page(
        f"{title}: {record.folder.absolute().name}", _head(record), sections
    )


def _all(record: RunRecord) -> dict[str, RunRecord]:
    """The run and those it is compared with, by method."""
    return {record.method: record, **record.compared}


# --------------------------------------------------------------------------- the top


def _head(record: RunRecord) -> list[Html]:
    """What happened in a sentence, and the most important numbers."""
    results = record.results
    dense, final = results["dense"] or {}, results["final"] or {}
    macs = results["macs"]
    parts = [paragraph(_summary(record))]
    for number, stage in enumerate(results["stages"], 1):
        for text in stage.get("warnings") or ():
            parts.append(paragraph(f"Step {number}: {text}.", kind="warning"))
    if not record.finished:
        parts.append(paragraph(_state(record), kind="warning"))
    end, left = "final" if record.finished else "so far", ""
    if results["nonzero"] is not None:
        left = f"{results['nonzero']:,} of {results['prunable']:,} weights left"
    top1 = [_in_percent(one.get("top1")) for one in (dense, final)]
    sparse = scaled(macs["sparse"] if macs else None)
    whole = f"of {scaled(macs['dense'])}, for one image" if macs else ""
    parts.append(
        html.tiles(
            [
                ("Top-1, dense", top1[0], _dense_from(record)),
                (f"Top-1, {end}", top1[1], "on the test split"),
                ("Sparsity", percent(results["sparsity"]), left),
                ("Multiply-accumulates", sparse, whole),
                ("Time", duration(results["seconds_total"]), "over all starts"),
                ("Peak memory", storage(results["peak_rss_bytes"]), "of the process"),
            ]
        )
    )
    return parts


def _in_percent(value: float | None) -> str:
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
    reached = "it has not reached the end of an epoch yet"
    if record.rows:
        last = record.rows[-1]
        reached = f"it has reached epoch {last['epoch']:g}, step {last['step']:,}"
    return (
        f"This run has not finished: {reached}, with {steps} done. The page shows its "
        "state at that moment; the same command with the same --workdir resumes it."
    )


def _dense_from(record: RunRecord) -> str:
    config = record.config
    epochs = f"{config['dense']['epochs']} epochs of training"
    if config["init_from"]:
        # A classifier of another size was trained first.
        rows = record.rows if config["fit_to_data"] else []
        trained = rows and rows[0]["event"] == "train"
        return f"from {config['init_from']}" + f", {epochs}" * bool(trained)
    if not config["dense"]["epochs"]:
        return "initial weights, not trained"
    return epochs


def _outcome(record: RunRecord) -> Html:
    """Dense against final, and against what the run was compared with."""
    dense = record.results["dense"]
    if dense is None:
        return paragraph("The dense network has not been evaluated yet.")

    def measured(found: Nested) -> list[str]:
        top1, top5 = fixed(found.get("top1")), fixed(found.get("top5"))
        return [top1, top5, fixed(found.get("loss"), 4)]

    rows = [["dense", percent(0.0), *measured(dense), ""]]
    for name, one in _all(record).items():
        final = one.results["final"] or {}
        known = final.get("top1") is not None and dense["top1"] is not None
        lost = fixed(dense["top1"] - final["top1"] if known else None)
        rows.append([name, percent(one.results["sparsity"]), *measured(final), lost])
    headers = ["", "sparsity", "top-1, %", "top-5, %", "loss, nats", "top-1 lost, %"]
    caption = f"On the test split. Dense: {_dense_from(record)}."
    return html.table(headers, rows, caption=caption)


# ----------------------------------------------------------------------- the history


def _course(record: RunRecord, drawn: dict[str, Picture]) -> Html:
    """Accuracy, sparsity and loss over the epochs, and the pruning steps."""
    runs = _evaluated_rows(record)
    if not runs:
        return paragraph("No epoch and no pruning step has ended yet.")
    shown = [drawn["comparison" if record.compared else "accuracy"]]
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
    for name, one in _all(record).items():
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


def _column(rows: Sequence[Nested], key: str) -> list[Any]:
    return [row.get(key) for row in rows]


def _at_one_epoch(runs: dict[str, list[Nested]]) -> bool:
    return len({row["epoch"] for rows in runs.values() for row in rows}) == 1


def _evaluated_rows(record: RunRecord) -> dict[str, list[Nested]]:
    """From method to the rows that have an accuracy; methods with some."""
    runs = {
        name: [row for row in one.rows if row.get("top1") is not None]
        for name, one in _all(record).items()
    }
    return {name: rows for name, rows in runs.items() if rows}


# ------------------------------------------------------------------------- the layers


def _by_layer(record: RunRecord) -> dict[str, float]:
    """Sparsity by path, in the order of the network.

    That order is known where multiply-accumulates were counted; elsewhere numbers in
    the names decide, ``block2`` before ``block10``.
    """
    places = {row["path"]: n for n, row in enumerate(record.results["layers"])}

    def place(path: str) -> tuple[int, list[Any]]:
        words: list[Any] = re.split(r"(\d+)", path)
        words[1::2] = map(int, words[1::2])
        return places.get(path, len(places)), words

    by_path = record.results["sparsity_by_path"]
    return {path: by_path[path] for path in sorted(by_path, key=place)}


def _layer_sparsity(record: RunRecord) -> Picture:
    levels = _by_layer(record)
    bars: list[Bars] = []
    for name, one in _all(record).items():
        own = one.results["sparsity_by_path"]
        values = [100 * own[path] if path in own else None for path in levels]
        bars.append(Bars(name, values, "marker" if bars else "bar"))
    return figures.rows(
        "Sparsity of the layers",
        "weights of the layer that are zero, %",
        [layer_name(path) for path in levels],
        bars,
        [f"{100 * value:.1f}" for value in levels.values()],
        PERCENT[1],
    )


def _layers(record: RunRecord, drawn: dict[str, Picture]) -> Html:
    """Sparsity and multiply-accumulates of each layer."""
    rows = record.results["layers"]
    costly = [row for row in rows if row["dense"]]
    shown = [drawn["sparsity"]] if "sparsity" in drawn else []
    if costly:
        macs = figures.rows(
            "Multiply-accumulates",
            "for one image",
            [layer_name(row["path"]) for row in costly],
            [
                Bars("sparse", _column(costly, "sparse")),
                Bars("dense", _column(costly, "dense"), "outline"),
            ],
            [f"{scaled(row['sparse'])} of {scaled(row['dense'])}" for row in costly],
        )
        shown.append(macs)
    parts = [html.figures(shown)] if shown else []
    if record.results["macs"] is None:
        why = "could not be counted for this network; the log says why"
        why = why if record.finished else "are counted when the run ends"
        parts.append(paragraph(f"Multiply-accumulates {why}."))
    if rows:
        caption = "MACs are multiply-accumulates for one image; sparse: without zeros."
        content = html.table(*tables.layers(rows), caption=caption, marked=[len(rows)])
        parts.append(details("Table of the layers", content))
    return html.joined(parts)


# -------------------------------------------------------------------- the pruning steps


def _saliencies(record: RunRecord) -> Html:
    """Histograms of the saliency, of the weights removed and kept at each step."""
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


def _losses(record: RunRecord, drawn: dict[str, Picture]) -> Html:
    """Increase of the loss as the quadratic model predicted it, and as measured."""
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
    shown += [picture for name, picture in drawn.items() if name.startswith("loss")]
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


# ------------------------------------------------------------------- time and memory


def _costs(record: RunRecord) -> Html:
    """Wall time of the phases, and memory."""
    phases = seconds_of_phases(record)
    parts = []
    if phases:
        bars, texts = list(phases.values()), list(map(duration, phases.values()))
        label, names = "wall time, s", list(phases)
        picture = figures.rows("Time", label, names, [Bars("", bars)], texts)
        parts.append(html.figures([picture]))
    rows = [["process, peak", storage(record.results["peak_rss_bytes"])]]
    plans = {stage["pruner"]: stage for stage in record.results["stages"]}
    for pruner, stage in plans.items():
        if stage.get("store") is None:
            continue
        gradients = "none"
        if stage["store"]:
            size = storage(stage["store_bytes"])
            gradients = f"{size} {stage['store_dtype']}, {stage['store']}"
        rows += [
            [f"{pruner}, planned", storage(stage["peak_bytes_planned"])],
            [f"{pruner}, limit", storage(stage["limit_bytes"])],
            [f"{pruner}, gradients", gradients],
        ]
    device = record.results["device"]
    if device:
        rows.append(["devices", f"{device['count']} x {device['kind']}"])
    caption = (
        "Memory. Planned: the peak of a pruning step by its memory plan; limit: what "
        "it was allowed; gradients: how many bytes of them were stored, and where."
    )
    return html.joined(
        [*parts, html.table(["", "memory"], rows, caption=caption, words=2)]
    )


def seconds_of_phases(record: RunRecord) -> dict[str, float]:
    """Wall time by phase, without those that took none; {} where it is unknown."""
    rows, stages = record.rows, record.results["stages"]
    total = record.results["seconds_total"]
    if total is None:
        return {}
    events = [row["event"] for row in rows]
    dense = events.index("dense") if "dense" in events else len(rows)

    def trained(part: list[Nested]) -> float:
        return sum(r.get("seconds") or 0.0 for r in part if r["event"] == "train")

    def pruned(name: str) -> float:
        return sum(stage.get(name) or 0.0 for stage in stages)

    parts = [pruned(f"seconds_{n}") for n in ("gradients", "curvature", "update")]
    phases = {
        "training, dense": trained(rows[:dense]),
        "training, pruned": trained(rows[dense:]),
        "gradients": parts[0],
        "curvature, masks": parts[1],
        "update": parts[2],
        "evaluation after pruning": pruned("seconds") - sum(parts),
    }
    phases["start, tests, saves"] = total - sum(phases.values())
    return {name: value for name, value in phases.items() if value > 0.005}


# --------------------------------------------------------------------------- latency


def latency(record: RunRecord) -> Html:
    """Dense against sparse products on the machine that they were timed on."""
    found = record.latency
    if not found:
        return html.joined(
            [
                paragraph(
                    "Not measured. This command times the products of the pruned "
                    "arrays, dense and sparse, on the machine that it runs on, and "
                    "adds them to this page:"
                ),
                html.code(f"python -m woodfisher_jax.report {record.folder} --latency"),
            ]
        )
    kinds = ("dense", "bcoo", "csr")
    rows = [
        [f"{one['batch_size']:,}", *(f"{one[kind]:.3g}" for kind in kinds)]
        for one in found["products"]
    ]
    machine = f"{found['processor'] or 'unknown processor'}, {found['cores']} cores"
    headers = ["rows at a time", "dense, ms", "BCOO, ms", "CSR, ms"]
    caption = (
        f"Median time of all pruned arrays' products, one after the other, on "
        f"{machine}; {found['products'][0]['device']} for dense and BCOO."
    )
    return html.joined(
        [
            forward_table(found.get("forward", []), machine),
            html.table(headers, rows, caption=caption, words=0),
            html.element(
                "ul", *(html.element("li", verdict(one)) for one in found["products"])
            ),
            paragraph(
                "Of sparse arrays only products are timed, no whole network: "
                "activations, norms and the patches of convolutions come on top. "
                "Dense is x W, compiled by XLA; its time does not depend on how many "
                "weights are zero, so a pruned network saved dense is as fast as "
                "before. BCOO is a sparse array of JAX, CSR one of SciPy on the CPU. "
                "At fractions of a millisecond the call itself counts as much as the "
                f"arithmetic. Sparsity then: {percent(found['sparsity'])}.",
                kind="note",
            ),
        ]
    )


def forward_table(passes: Sequence[Nested], machine: str) -> Html:
    """Whole forward passes of a network from which structure was taken out."""
    if not passes:
        return html.joined([])
    rows = []
    for one in passes:
        (dense, *_), (small, *_) = one["dense"], one["small"]
        shown = [
            f"{middle:.3g} ({lower:.3g} to {upper:.3g})"
            for middle, lower, upper in (one["dense"], one["small"])
        ]
        where = f"{one['runtime']}, {one['device']}"
        rows.append([f"{one['batch_size']:,}", where, *shown, f"{dense / small:.2f}"])
    caption = (
        "Whole forward pass of the network as its model has it and as it is in this "
        f"run, with fewer outputs a layer: medians and quartiles on {machine}."
    )
    headers = ["images at a time", "run by", "dense, ms", "small, ms", "times faster"]
    return html.table(headers, rows, caption=caption, words=0)


def verdict(one: Nested) -> str:
    """Which of dense and sparse is faster, and by how much."""
    parts = []
    for name, label in (("bcoo", "BCOO"), ("csr", "CSR")):
        ratio = one[name] / one["dense"]
        if 0.95 <= ratio <= 1.05:
            parts.append(f"{label} is as fast as dense, to 5 %")
        else:
            how = "slower" if ratio > 1 else "faster"
            factor = max(ratio, 1 / ratio)
            parts.append(f"{label} is {how} than dense, by a factor of {factor:.1f}")
    rows = one["batch_size"]
    given = "One row" if rows == 1 else f"{rows:,} rows"
    return f"{given} at a time: {'; '.join(parts)}."


# ---------------------------------------------------------------------------- origin


def origin(record: RunRecord) -> Html:
    """The config, the command, a config file that stands alone, and versions."""
    changes = flat(_changes(record.config, record.defaults))
    fields, defaults = flat(record.config), flat(record.defaults)
    rows = [
        [name, _text(value), _text(defaults.get(name, NONE))]
        for name, value in fields.items()
    ]
    changed = [n for n, name in enumerate(fields) if name in changes]
    headers = ["field", "here", "default"]
    short = html.table(
        headers,
        [rows[number] for number in changed],
        caption="What differs from the defaults.",
        words=3,
    )
    caption = "All fields; those that differ are marked."
    whole = html.table(headers, rows, caption=caption, words=3, marked=changed)
    alone = [
        paragraph("All that differs from the defaults, as a file for --config:"),
        html.code(config_file(record)),
    ]
    if record.command:
        folded = details("The same from a config file alone", *alone)
        alone = [html.code(record.command), folded]
    parts = [
        short,
        details(f"All {len(rows)} fields", whole),
        html.element("h3", "To repeat this run"),
        *alone,
    ]
    versions = record.results["versions"]
    if versions:
        cells = [[name, v or "not installed"] for name, v in versions.items()]
        caption = "Versions that it ran with."
        parts.append(
            html.table(["package", "version"], cells, caption=caption, words=2)
        )
    return html.joined(parts)


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def config_file(record: RunRecord) -> str:
    """A Python file for ``--config`` that states what differs from the defaults."""
    changes = _changes(record.config, record.defaults)
    literal = pprint.pformat(changes, sort_dicts=False)
    return (
        '"""python -m woodfisher_jax.main --config=config.py"""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config() -> ConfigDict:\n"
        f"    return ConfigDict(\n{textwrap.indent(literal, ' ' * 8)}\n    )\n"
    )


def flat(config: Nested, where: str = "") -> Nested:
    """Fields by their whole names, such as ``prune.method``."""
    fields: Nested = {}
    for key, value in config.items():
        name = f"{where}.{key}" if where else key
        fields |= flat(value, name) if isinstance(value, dict) else {name: value}
    return fields


def _changes(values: Nested, defaults: Nested) -> Nested:
    """What of nested dicts differs from the defaults."""
    changed: Nested = {}
    for key, value in values.items():
        if isinstance(value, dict):
            inner = _changes(value, defaults.get(key) or {})
            changed |= {key: inner} if inner else {}
        elif key not in defaults or value != defaults[key]:
            changed[key] = value
    return changed
