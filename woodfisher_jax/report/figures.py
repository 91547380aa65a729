"""Figures of runs, each drawn once by matplotlib: PNG files, and SVG inside a page.

matplotlib is an optional extra, so it is imported when a figure is drawn, and without
pyplot, which keeps a global list of figures. A :class:`Picture` is drawn in the colours
of :data:`LIGHT`; in its SVG they are variables of the page's style sheet.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from woodfisher_jax.report.quantities import (
    counted,
    duration,
    percent,
    power_of_ten,
    scaled,
    significant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Range = tuple[float, float]

PERCENT, POSITIVE, ANY = (0.0, 100.0), (0.0, math.inf), (-math.inf, math.inf)
"""What a quantity can be: the limits of its axis stay inside."""

# Okabe and Ito's colours, darkened to be read on white and pale on a dark screen: they
# are distinct for colour-blind readers too. Dashes and markers repeat the distinction.
LIGHT = {
    "page": "#ffffff",
    "panel": "#f5f6f8",
    "text": "#1b1f24",
    "faint": "#57606a",
    "line": "#d0d7de",
    "grid": "#e3e6ea",
    "mark": "#fff3d6",
    "s0": "#0072b2",
    "s1": "#c24f00",
    "s2": "#007d5b",
    "s3": "#a3527f",
    "s4": "#8a6100",
    "s5": "#2b2f36",
}
DARK = {
    "page": "#14171c",
    "panel": "#1e232a",
    "text": "#e6e9ed",
    "faint": "#a3adb8",
    "line": "#3d4650",
    "grid": "#2c333b",
    "mark": "#453713",
    "s0": "#56b4e9",
    "s1": "#e69f00",
    "s2": "#2cc79b",
    "s3": "#e39bc2",
    "s4": "#f0e442",
    "s5": "#f2f4f7",
}
STYLES = 6
DASHES = (
    "-",
    (0, (4, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (2, 1.5)),
    (0, (9, 3)),
)
MARKERS = "osD^vP"

WIDTH = 5.6
"""Inches of a figure, at 72 units an inch in SVG: as wide as a telephone's screen."""

SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["faint"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": LIGHT["text"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "savefig.dpi": 180,
    "svg.fonttype": "none",
    # The same ids, hence the same bytes, from the same data.
    "svg.hashsalt": "woodfisher_jax",
    "text.color": LIGHT["text"],
    "xtick.color": LIGHT["faint"],
    "xtick.labelcolor": LIGHT["text"],
    "ytick.color": LIGHT["faint"],
    "ytick.labelcolor": LIGHT["text"],
}


class MissingExtraError(ImportError):
    """matplotlib is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "matplotlib is not installed; pip install 'woodfisher-jax[report]' gives "
            "plots and report.html"
        )


class Picture(NamedTuple):
    """A figure, and in words what it shows."""

    figure: "Figure"
    words: str

    def png(self, path: Path) -> None:
        """Writes the figure as PNG."""
        with _settings():
            self.figure.savefig(path, format="png")

    def svg(self) -> str:
        """The figure as an element of an HTML page.

        It has no namespaces, no style sheet and no size of its own; its ids begin with
        a hash of its content, so that those of several figures in a page differ.
        """
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with _settings():
            self.figure.savefig(
                buffer, format="svg", transparent=True, metadata=nothing
            )
        text = re.sub(
            r"<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.S
        )
        text = re.sub(r"\s*\n\s*", " ", text[text.index("<svg") :])
        box = re.search(r'viewBox="[^"]*"', text)
        assert box is not None
        alternative = f'role="img" aria-label="{html.escape(self.words)}"'
        text = re.sub(r"<svg[^>]*>", f"<svg {box[0]} {alternative}>", text, count=1)
        text = text.replace("xlink:href", "href")
        text = re.sub(r" font-family: [^;\"]*;?", "", text)
        prefix = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = re.sub(r'( id="| href="#|url\(#)', rf"\g<1>f{prefix}-", text)
        for name, colour in LIGHT.items():
            text = text.replace(colour, f"var(--{name})")
        return text


class Series(NamedTuple):
    """Points of one colour, dash and marker.

    Attributes:
        name: In the legend; "" for none.
        xs: Where the points are.
        ys: As many; None where unknown.
        style: Number of colour, dash and marker.
        kind: line; points (a line with a marker at each point); markers (those alone);
            or steps (a line that keeps its height up to the next point).
        errors: Half the length of a bar through each point; none.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    style: int = 0
    kind: str = "line"
    errors: Sequence[float] = ()

    @property
    def words(self) -> str:
        """What it shows."""
        points = [
            (x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None
        ]
        heights = [y for _, y in points]
        (first, start), (last, end) = points[0], points[-1]
        return (
            f"{self.name}: {counted(len(points), 'point')}, {number(start)} at "
            f"{number(first)}, {number(end)} at {number(last)}, lowest "
            f"{number(min(heights))}, highest {number(max(heights))}"
        )


class Panel(NamedTuple):
    """One pair of axes of a figure.

    Attributes:
        label: Of the heights, with their unit.
        series: What is drawn.
        possible: The least and the greatest height there can be.
        reference: Name and height of a dotted line across.
    """

    label: str
    series: Sequence[Series]
    possible: Range
    reference: tuple[str, float] | None = None


class Bars(NamedTuple):
    """One bar, or one marker, in each row of a chart.

    Attributes:
        name: In the legend.
        values: A number a row, or None.
        style: Number of colour and marker.
        kind: bar; outline, around the bars; or marker.
    """

    name: str
    values: Sequence[float | None]
    style: int = 0
    kind: str = "bar"


# --------------------------------------------------------------------- what is shown


def accuracy(runs: Mapping[str, Rows], dense: float | None) -> Picture:
    """Top-1 and sparsity over the epochs; bars where all rows are of one epoch.

    Args:
        runs: From method to rows with a ``top1``, at least one in all.
        dense: Top-1 of the dense network, in percent.
    """
    if len({row["epoch"] for rows in runs.values() for row in rows}) == 1:
        return _accuracy_bars(runs)
    heights, levels = [], []
    for style, (name, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        heights.append(Series(name, epochs, [row["top1"] for row in rows], style))
        pruned = [row for row in rows if row["event"] == "prune"]
        if pruned:
            at, top1 = ([row[key] for row in pruned] for key in ("epoch", "top1"))
            heights.append(Series(f"{name}, just pruned", at, top1, style, "markers"))
        sparsity = [100 * (row.get("sparsity") or 0.0) for row in rows]
        levels.append(Series(name, epochs, sparsity, style, "steps"))
    reference = ("dense", dense) if dense is not None else None
    panels = [
        Panel("top-1 on the test split, %", heights, PERCENT, reference),
        Panel("prunable weights that are zero, %", levels, PERCENT),
    ]
    picture = _lines("Accuracy and sparsity", panels, "epoch")
    picture.figure.axes[1].set_ylim(PERCENT)
    return picture


def _accuracy_bars(runs: Mapping[str, Rows]) -> Picture:
    first, bars = next(iter(runs.values())), []
    labels = [
        row["event"]
        if row["event"] != "prune"
        else f"pruned, {percent(row.get('sparsity'), 1)}"
        for row in first
    ]
    for style, (name, rows) in enumerate(runs.items()):
        values = [*(row["top1"] for row in rows), *[None] * len(labels)][: len(labels)]
        bars.append(Bars(name, values, style, "marker" if style else "bar"))
    texts = [f"{row['top1']:.2f}" for row in first]
    label = "top-1 on the test split, %"
    return _rows("Accuracy", labels, bars, texts, label, PERCENT[1])


def loss(runs: Mapping[str, Rows]) -> Picture | None:
    """Test loss over the epochs; None where no row has one."""
    series = [
        Series(
            name, [row["epoch"] for row in rows], [row.get("loss") for row in rows], n
        )
        for n, (name, rows) in enumerate(runs.items())
        if any(row.get("loss") is not None for row in rows)
    ]
    panel = Panel("test loss, nats an image", series, POSITIVE)
    return _lines("Loss", [panel], "epoch") if series else None


def layer_sparsity(runs: Mapping[str, Mapping[str, float]]) -> Picture:
    """Sparsity of each layer: bars of the first run, markers of the others.

    Args:
        runs: From method to sparsity by path; the first has at least one.
    """
    first, *_ = runs.values()
    bars = [
        Bars(
            name,
            [100 * levels[path] if path in levels else None for path in first],
            style,
            "marker" if style else "bar",
        )
        for style, (name, levels) in enumerate(runs.items())
    ]
    labels, texts = (
        list(map(layer_name, first)),
        [f"{100 * v:.1f}" for v in first.values()],
    )
    label = "weights of the layer that are zero, %"
    return _rows("Sparsity of the layers", labels, bars, texts, label, PERCENT[1])


def layer_macs(layers: Rows) -> Picture:
    """Multiply-accumulates of each layer, dense and sparse.

    Args:
        layers: ``layers`` of the results, at least one.
    """
    return _rows(
        "Multiply-accumulates",
        [layer_name(row["path"]) for row in layers],
        [
            Bars("dense", [row["dense"] for row in layers], 5, "outline"),
            Bars("sparse", [row["sparse"] for row in layers]),
        ],
        [f"{scaled(row['sparse'])} of {scaled(row['dense'])}" for row in layers],
        "for one image",
    )


def layer_name(path: str) -> str:
    """The path of a parameter without what all kernels end in."""
    return path.removesuffix("/kernel")


def seconds(phases: Mapping[str, float]) -> Picture:
    """Wall time of each phase of a run, at least one."""
    bars, texts = list(phases.values()), [duration(value) for value in phases.values()]
    return _rows("Time", list(phases), [Bars("", bars)], texts, "wall time, s")


def saliencies(title: str, histogram: Mapping[str, Any], label: str) -> Picture:
    """Histograms of the saliency of the weights removed and kept by a pruning step.

    Args:
        title: Above the figure.
        histogram: ``low`` and ``high``, the logarithms to the base of ten of the outer
            edges, and in equal bins between them the counts ``removed`` and ``kept``.
        label: Of the saliency, with its unit.
    """
    low, high = histogram["low"], histogram["high"]
    said = []
    with _settings():
        figure, (axes,) = _figure(title, 3.2)
        for style, name in enumerate(("removed", "kept")):
            counts, colour = histogram[name], LIGHT[f"s{style}"]
            width = (high - low) / len(counts)
            edges = [low + n * width for n in range(len(counts) + 1)]
            axes.stairs(counts, edges, fill=True, color=(colour, 0.25), linewidth=0)
            axes.stairs(
                counts, edges, color=colour, linestyle=DASHES[style], label=name
            )
            said.append(f"{name}: {sum(counts):,}")
        axes.set_xlim(low, high)
        if high - low > 2:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title("weights")
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(lambda value, _: power_of_ten(value))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        _legend(figure, ("removed", "kept"))
    ends = f"from {power_of_ten(low)} to {power_of_ten(high)}"
    return Picture(figure, f"{title}: weights by {label}, {ends}. {'; '.join(said)}.")


def loss_increases(
    measured: Sequence[float | None], predicted: Sequence[float | None]
) -> Picture:
    """Increase of the loss at each pruning step, measured and predicted."""
    steps = range(1, len(measured) + 1)
    values = {"measured": measured, "predicted": predicted}
    series = [
        Series(name, steps, ys, style, "points")
        for style, (name, ys) in enumerate(values.items())
        if any(y is not None for y in ys)
    ]
    panel = Panel("nats an example", series, ANY)
    return _lines("Increase of the loss", [panel], "pruning step")


def loss_path(title: str, path: Mapping[str, Sequence[float | None]]) -> Picture:
    """Loss from the weights before a pruning step to those after it.

    Args:
        title: Above the figure.
        path: ``fractions`` of the way, and at each of them the loss ``train``, ``test``
            (may be empty) and of the local model ``quadratic`` and ``with_slope``.
    """
    names = {
        "train": "training",
        "quadratic": "quadratic model",
        "with_slope": "with the slope",
        "test": "test",
    }
    series = [
        Series(name, path["fractions"], path[key], style)  # type: ignore[arg-type]
        for style, (key, name) in enumerate(names.items())
        if any(y is not None for y in path[key])
    ]
    # A model of the loss can be below zero, where no loss is.
    lowest = min((y for one in series for y in one.ys if y is not None), default=0.0)
    panel = Panel("loss, nats an example", series, (min(lowest, 0.0), math.inf))
    label = "share of the way from the old weights to the new"
    return _lines(title, [panel], label, (0.0, 1.0))


def accuracy_by_sparsity(
    title: str, series: Sequence[Series], dense: float | None
) -> Picture:
    """Curves of several runs, with a line at the accuracy of the dense network."""
    reference = ("dense, mean", dense) if dense is not None else None
    panel = Panel("top-1 on the test split, %", series, PERCENT, reference)
    return _lines(title, [panel], "prunable weights that are zero, %", PERCENT)


# ------------------------------------------------------------------------ how it is drawn


def number(value: float) -> str:
    """A number as an axis shows it."""
    return scaled(value) if abs(value) >= 1e4 else significant(value, 4)


def _settings() -> Any:
    """The settings of all figures, while they are drawn and written."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingExtraError from error
    return matplotlib.rc_context(SETTINGS)


def _figure(
    title: str, height: float, panels: int = 1
) -> tuple["Figure", list["Axes"]]:
    """Axes one above the other, the upper ones twice as high as the last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    ratios = [2] * (panels - 1) + [1]
    axes = figure.subplots(panels, sharex=True, squeeze=False, height_ratios=ratios)
    return figure, list(axes[:, 0])


def _legend(figure: "Figure", names: Iterable[str]) -> None:
    """A legend below, each name once, for which the figure grows."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    names = [name for name in dict.fromkeys(names) if name]
    columns = max(1, 54 // (max(map(len, names)) + 7))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower left",
        ncols=columns,
        fontsize=10,
    )
    lines = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * lines)


def _within(limits: Range, possible: Range) -> Range:
    """The limits of an axis, cut to what is possible."""
    return max(limits[0], possible[0]), min(limits[1], possible[1])


def _lines(
    title: str, panels: Sequence[Panel], label: str, possible: Range = POSITIVE
) -> Picture:
    """Panels over one horizontal axis.

    Args:
        title: Above the figure.
        panels: One above the other; in all at least one point.
        label: Of the horizontal axis.
        possible: The least and the greatest value there.
    """
    said, names = [], []
    with _settings():
        figure, every = _figure(title, 1.2 + 2 * len(panels), len(panels))
        for axes, panel in zip(every, panels, strict=True):
            for one in panel.series:
                _draw(axes, one)
            if panel.reference:
                name, height = panel.reference
                axes.axhline(height, color=LIGHT["faint"], linestyle=":", label=name)
            axes.set_title(panel.label)
            axes.set_ylim(_within(axes.get_ylim(), panel.possible))
            axes.yaxis.set_major_formatter(lambda value, _: number(value))
            words = [one.words for one in panel.series]
            names += [one.name for one in panel.series]
            if panel.reference:
                names.append(panel.reference[0])
                words.append(f"{panel.reference[0]}: {number(panel.reference[1])}")
            said.append(f"{panel.label} against {label}. {'; '.join(words)}.")
        axes.set_xlim(_within(axes.get_xlim(), possible))
        xs = [x for panel in panels for one in panel.series for x in one.xs]
        if all(float(x).is_integer() for x in xs):  # There are no half epochs.
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.set_xlabel(label)
        _legend(figure, names)
    return Picture(figure, f"{title}: {' '.join(said)}")


def _draw(axes: "Axes", one: Series) -> None:
    style = one.style % STYLES
    points = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y is not None]
    marked = one.kind in ("points", "markers") or len(points) == 1
    looks: dict[str, Any] = {
        "color": LIGHT[f"s{style}"],
        "linestyle": "" if one.kind == "markers" else DASHES[style],
        "marker": MARKERS[style] if marked else "",
        "drawstyle": "steps-post" if one.kind == "steps" else "default",
    }
    xs, ys = [x for x, _ in points], [y for _, y in points]
    # A point at 100 %, the end of its axis, is drawn whole.
    axes.plot(xs, ys, label=one.name, clip_on=False, **looks)
    for (x, y), error in zip(points, one.errors, strict=False):
        if error:
            axes.errorbar(x, y, yerr=error, ecolor=looks["color"], capsize=4)


def _rows(
    title: str,
    labels: Sequence[str],
    bars: Sequence[Bars],
    texts: Sequence[str],
    x_label: str,
    x_max: float | None = None,
) -> Picture:
    """Horizontal bars, each below the whole name of its row, the first on top.

    Args:
        title: Above the figure.
        labels: Of the rows.
        bars: What each row holds, the first drawn first.
        texts: At the end of each row's name.
        x_label: Of the axis, with its unit.
        x_max: Where the axis ends; default the largest value.
    """
    known = [value for one in bars for value in one.values if value is not None]
    with _settings():
        figure, (axes,) = _figure(title, 1.1 + 0.42 * len(labels))
        for one in bars:
            _draw_bars(axes, one)
        axes.set_xlim(0, x_max or max(known, default=0.0) or 1.0)
        axes.set_ylim(len(labels) - 0.5, -0.6)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.set_xlabel(x_label)
        place = axes.get_yaxis_transform()
        for row, (name, text) in enumerate(zip(labels, texts, strict=True)):
            # A letter is 0.62 of its size wide; a long name is smaller, and whole.
            size = min(11, 380 / (0.62 * (len(name) + len(text) + 2)))
            for x, content, side in ((0.01, name, "left"), (1, text, "right")):
                axes.text(x, row, content, transform=place, ha=side, fontsize=size)
        if len(bars) > 1:
            _legend(figure, [one.name for one in bars])
    said = "; ".join(f"{a}: {b}" for a, b in zip(labels, texts, strict=True))
    return Picture(figure, f"{title}: {x_label}. {said}.")


def _draw_bars(axes: "Axes", one: Bars) -> None:
    style = one.style % STYLES
    colour = LIGHT[f"s{style}"]
    known = [(row, value) for row, value in enumerate(one.values) if value is not None]
    places, values = [row + 0.22 for row, _ in known], [value for _, value in known]
    if one.kind == "marker":
        axes.plot(
            values,
            places,
            label=one.name,
            linestyle="",
            marker=MARKERS[style],
            color=colour,
            markerfacecolor=LIGHT["page"],  # To be seen on a bar.
            markeredgewidth=2,
            clip_on=False,
        )
    elif one.kind == "outline":
        looks = {"facecolor": "none", "edgecolor": LIGHT["faint"], "clip_on": False}
        axes.barh(places, values, height=0.3, label=one.name, **looks)
    else:
        axes.barh(places, values, height=0.24, label=one.name, color=colour)
