"""Figures, each drawn once by matplotlib: written as PNG, and as SVG inside a page.

matplotlib is an optional extra, so it is imported when a figure is drawn, and without
pyplot, which keeps a global list of figures. A figure has the light :data:`COLOURS`; in
its SVG they are variables, which the page's style sheet changes on a dark screen.
"""

import hashlib
import html
import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from woodfisher_jax.extras import require
from woodfisher_jax.report.elements.quantities import counted, number, power_of_ten
from woodfisher_jax.written_files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Range = tuple[float, float]

PERCENT, POSITIVE, ANY = (0.0, 100.0), (0.0, math.inf), (-math.inf, math.inf)
"""What a quantity can be: the limits of its axis stay inside."""

COLOURS = {
    "page": ("#ffffff", "#14171c"),
    "panel": ("#f5f6f8", "#1e232a"),
    "text": ("#1b1f24", "#e6e9ed"),
    "faint": ("#57606a", "#a3adb8"),
    "line": ("#d0d7de", "#3d4650"),
    "grid": ("#e3e6ea", "#2c333b"),
    "mark": ("#fff3d6", "#453713"),
    # Okabe and Ito's, distinct for colour-blind readers too: darkened to be read on
    # white, and their pale ones. Dashes and markers repeat the distinction.
    "s0": ("#0072b2", "#56b4e9"),
    "s1": ("#c24f00", "#e69f00"),
    "s2": ("#007d5b", "#2cc79b"),
    "s3": ("#a3527f", "#e39bc2"),
    "s4": ("#8a6100", "#f0e442"),
    "s5": ("#2b2f36", "#f2f4f7"),
}
"""Of light and of dark pages."""

TEXT, FAINT = COLOURS["text"][0], COLOURS["faint"][0]
STYLES = [COLOURS[f"s{n}"][0] for n in range(6)]
DASHES = (
    "-",
    (0, (4, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (2, 1.5)),
    (0, (9, 3)),
)
MARKERS = "osD^vP"

WIDTH = 5.2
"""Inches of a figure, at 72 units an inch in SVG: as wide as a telephone's screen."""

SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "grid.color": COLOURS["grid"][0],
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 180,
    "svg.fonttype": "none",
    # The same ids, hence the same bytes, from the same data.
    "svg.hashsalt": "woodfisher_jax",
    # A dollar sign in a name is one.
    "text.parse_math": False,
    **dict.fromkeys(("axes.labelcolor", "text.color"), TEXT),
    **dict.fromkeys(("xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), TEXT),
}


class Picture(NamedTuple):
    """A figure.

    Attributes:
        figure: Drawn.
        words: What it shows, for those who do not see it.
        remark: Below it on a page; none.
    """

    figure: "Figure"
    words: str
    remark: str = ""

    def png(self, path: Path) -> None:
        """Writes the figure as PNG."""
        buffer = io.BytesIO()
        with _settings():
            self.figure.savefig(buffer, format="png")
        replace_file(path, buffer.getvalue())

    def svg(self) -> str:
        """The figure as an element of an HTML page.

        It has no namespaces, no style sheet, no fonts and no size of its own. Its ids
        begin with a hash of its content, so that those of several figures differ.
        """
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with _settings():
            self.figure.savefig(
                buffer, format="svg", transparent=True, metadata=nothing
            )
        words = f'role="img" aria-label="{html.escape(self.words)}"'
        _, _, text = buffer.getvalue().partition("<svg")
        text = re.sub(r'^.*?(viewBox="[^"]*").*?>', rf"<svg \1 {words}>", text, count=1)
        text = re.sub(r"(?s)<style.*?</style>|<!--.*?-->", "", text)
        text = re.sub(r" font-family: [^;\"]*;?", "", text)
        text = re.sub(r"\s*\n\s*", " ", text).replace("xlink:href", "href")
        prefix = f"w{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
        text = re.sub(r'( id="| href="#|url\(#)', rf"\g<1>{prefix}", text)
        for name, (light, _) in COLOURS.items():
            text = text.replace(light, f"var(--{name})")
        return text


class Series(NamedTuple):
    """Points of one colour, dash and marker.

    Attributes:
        name: In the legend.
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
    def points(self) -> list[tuple[float, float]]:
        """The points whose height is known."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]


class Panel(NamedTuple):
    """One pair of axes of a figure.

    Attributes:
        label: Of the heights, with their unit.
        series: What is drawn; those without a known point are left out.
        possible: The least and the greatest height there can be.
        reference: Name and height of a dotted line across.
    """

    label: str
    series: Sequence[Series]
    possible: Range
    reference: tuple[str, float] | None = None


class Bars(NamedTuple):
    """One bar, or one marker, in each row of a figure.

    Attributes:
        name: In the legend.
        values: A number a row, or None.
        kind: bar; outline, around the bars; or marker.
    """

    name: str
    values: Sequence[float | None]
    kind: str = "bar"


def lines(
    title: str, label: str, panels: Sequence[Panel], possible: Range = POSITIVE
) -> Picture:
    """Lines and points over one horizontal axis.

    Args:
        title: Above the figure.
        label: Of the horizontal axis, with its unit.
        panels: One above the other.
        possible: The least and the greatest value on the horizontal axis.
    """
    words, names = [], []
    with _settings():
        figure, every = _figure(0.6 + 1.4 * len(panels), len(panels))
        for axes, panel in zip(every, panels, strict=True):
            known = [one for one in panel.series if one.points]
            for one in known:
                _draw(axes, one)
            names += [one.name for one in known]
            said = list(map(_words, known))
            if panel.reference:
                name, height = panel.reference
                axes.axhline(height, color=FAINT, linestyle=":", label=name)
                names.append(name)
                said.append(f"{name}: {number(height)}")
            axes.set_title(panel.label)
            axes.set_ylim(_within(axes.get_ylim(), panel.possible))
            axes.yaxis.set_major_formatter(lambda value, _: number(value))
            words.append(f"{panel.label} against {label}. {'; '.join(said)}.")
        axes.set_xlim(_within(axes.get_xlim(), possible))
        xs = [x for panel in panels for one in panel.series for x in one.xs]
        if all(float(x).is_integer() for x in xs):  # There are no half epochs.
            _whole(axes)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.set_xlabel(label)
        return _finished(figure, title, names, " ".join(words))


def rows(
    title: str,
    label: str,
    names: Sequence[str],
    bars: Sequence[Bars],
    texts: Sequence[str],
    end: float | None = None,
) -> Picture:
    """Horizontal bars, each below the whole name of its row, the first on top.

    Args:
        title: Above the figure.
        label: Of the axis, with its unit.
        names: Of the rows.
        bars: What each row holds, the first drawn first.
        texts: The values of each row in words, beside its name.
        end: Of the axis; default the largest value.
    """
    known = [value for one in bars for value in one.values if value is not None]
    with _settings():
        figure, (axes,) = _figure(0.1 + 0.42 * len(names))
        for style, one in enumerate(bars):
            _draw_bars(axes, one, style)
        axes.set_xlim(0, end or max(known) or 1.0)
        axes.set_ylim(len(names) - 0.5, -0.6)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.set_xlabel(label)
        place = axes.get_yaxis_transform()
        for row, (name, text) in enumerate(zip(names, texts, strict=True)):
            # A letter is 0.62 of its size wide: a long name is smaller, and whole.
            size = min(12, 350 / (0.62 * (len(name) + len(text) + 2)))
            axes.text(0.01, row, name, transform=place, fontsize=size)
            axes.text(1, row, text, transform=place, fontsize=size, ha="right")
        words = "; ".join(f"{a}: {b}" for a, b in zip(names, texts, strict=True))
        shown = [one.name for one in bars] if len(bars) > 1 else []
        return _finished(figure, title, shown, f"{label}. {words}.", left=0.1)


def histograms(title: str, label: str, histogram: Mapping[str, Any]) -> Picture:
    """Histograms of the weights removed and kept, one over the other.

    Args:
        title: Above the figure.
        label: Of the horizontal axis, with its unit.
        histogram: ``low`` and ``high``, the logarithms to the base of ten of the outer
            edges, and in equal bins between them the counts ``removed`` and ``kept``.
    """
    low, high = histogram["low"], histogram["high"]
    names = ("removed", "kept")
    with _settings():
        figure, (axes,) = _figure(2.0)
        for name, colour, dash in zip(names, STYLES, DASHES, strict=False):
            counts = histogram[name]
            width = (high - low) / len(counts)
            edges = [low + n * width for n in range(len(counts) + 1)]
            axes.stairs(counts, edges, fill=True, color=(colour, 0.25), linewidth=0)
            axes.stairs(counts, edges, color=colour, linestyle=dash, label=name)
        axes.set_xlim(low, high)
        if high - low > 2:
            _whole(axes)
        axes.xaxis.set_major_formatter(lambda value, _: power_of_ten(value))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.set_title("weights")
        axes.set_xlabel(label)
        words = "; ".join(f"{name}: {sum(histogram[name]):,}" for name in names)
        ends = f"from {power_of_ten(low)} to {power_of_ten(high)}"
        words = f"weights by {label}, {ends}. {words}."
        return _finished(figure, title, names, words)


def heat_map(
    title: str,
    label: str,
    cells: Mapping[str, Mapping[int, float]],
    ends: tuple[float, float | None],
) -> Picture:
    """Coloured cells, rows by name against whole numbers, with a scale of colours.

    Args:
        title: Above the figure, with the unit.
        label: Of the horizontal axis.
        cells: From the name of a row to its values by number.
        ends: Of the scale; None is the largest value.
    """
    known = {column for row in cells.values() for column in row}
    columns = range(min(known), max(known) + 1)
    values = [[row.get(c, math.nan) for c in columns] for row in cells.values()]
    with _settings():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import FuncFormatter

        figure, (axes,) = _figure(0.3 * len(cells) + 0.2)
        colours = LinearSegmentedColormap.from_list("", ["#e3eef7", "#063a5c"])
        edges = [c - 0.5 for c in (*columns, columns.stop)]
        heights = [n - 0.5 for n in range(len(cells) + 1)]
        mesh = axes.pcolormesh(
            edges, heights, values, cmap=colours, vmin=ends[0], vmax=ends[1]
        )
        axes.invert_yaxis()
        axes.set_yticks(range(len(cells)), [name for name in cells], fontsize=9)
        axes.grid(visible=False)
        axes.set_xlabel(label)
        _whole(axes)
        figure.colorbar(
            mesh,
            ax=axes,
            fraction=0.05,
            pad=0.02,
            format=FuncFormatter(lambda value, _: number(value)),
        )
        words = "; ".join(
            f"{name}: {number(min(row.values()))} to {number(max(row.values()))}"
            for name, row in cells.items()
        )
        longest = max(map(len, cells))
        left = 0.2 + 0.075 * longest
        # Room for the numbers of the scale.
        return _finished(figure, title, [], f"{label}. {words}.", left, right=0.65)


def _settings() -> Any:
    """The settings of all figures, in force while one is drawn and written."""
    matplotlib = require("matplotlib", "a plot or report.html")
    return matplotlib.rc_context(SETTINGS)


def _figure(height: float, panels: int = 1) -> tuple["Figure", list["Axes"]]:
    """Axes one above the other, all but the last of double height.

    Args:
        height: Of all of them, in inches, without what stands around them.
        panels: How many.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    heights = [2] * (panels - 1) + [1]
    axes = figure.subplots(panels, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def _finished(
    figure: "Figure",
    title: str,
    names: Iterable[str],
    words: str,
    left: float = 0.75,
    right: float = 0.18,
) -> Picture:
    """The figure with a title above and a legend below, for which it grows.

    Room is measured out in inches: a layout engine of matplotlib would draw each
    figure twice.

    Args:
        figure: With its axes.
        title: Of the figure.
        names: In the legend, each once.
        words: What it shows.
        left: Room for labels at the vertical axis.
        right: Room at the other side.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    names = [name for name in dict.fromkeys(names) if name in handles]
    # A name that is wider than the figure continues on a second line.
    texts = [textwrap.fill(name, 46) for name in names]
    columns = max(1, 46 // (max(map(len, texts), default=0) + 5))
    lines = math.ceil(sum(text.count("\n") + 1 for text in texts) / columns)
    top = 0.62 if axes.get_title(loc="left") else 0.36
    bottom = 0.52 + (0.15 if names else 0) + 0.2 * lines
    height = figure.get_figheight() + top + bottom
    figure.set_figheight(height)
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - right / WIDTH,
        bottom=bottom / height,
        top=1 - top / height,
        hspace=0.25,
    )
    looks = {"fontsize": 13, "fontweight": "bold", "ha": "left", "va": "top"}
    figure.suptitle(title, x=0.08 / WIDTH, y=1 - 0.08 / height, **looks)
    figure.legend(
        [handles[name] for name in names],
        texts,
        loc="lower left",
        bbox_to_anchor=(0, 0),
        borderaxespad=0,
        ncols=columns,
        fontsize=11,
    )
    return Picture(figure, f"{title}: {words}")


def _within(limits: Range, possible: Range) -> Range:
    """The limits of an axis, cut to what is possible."""
    return max(limits[0], possible[0]), min(limits[1], possible[1])


def _whole(axes: "Axes") -> None:
    """Leaves only whole numbers on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _draw(axes: "Axes", one: Series) -> None:
    style, points = one.style % len(STYLES), one.points
    marked = one.kind in ("points", "markers") or len(points) == 1
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        label=one.name,
        color=STYLES[style],
        linestyle="" if one.kind == "markers" else DASHES[style],
        marker=MARKERS[style] if marked else "",
        drawstyle="steps-post" if one.kind == "steps" else "default",
        clip_on=False,  # A point at 100 %, the end of its axis, is drawn whole.
    )
    for (x, y), error in zip(points, one.errors, strict=False):
        if error:
            axes.errorbar(x, y, yerr=error, ecolor=STYLES[style], capsize=4)


def _draw_bars(axes: "Axes", one: Bars, style: int) -> None:
    colour, marker = STYLES[style % len(STYLES)], MARKERS[style % len(STYLES)]
    known = [(row, value) for row, value in enumerate(one.values) if value is not None]
    places, values = [row + 0.26 for row, _ in known], [value for _, value in known]
    looks: dict[str, Any] = {"label": one.name, "clip_on": False}
    if one.kind == "marker":
        looks |= {"color": colour, "linestyle": "", "markeredgewidth": 2}
        # Filled with the colour of the page, to be seen on a bar.
        looks |= {"marker": marker, "markerfacecolor": COLOURS["page"][0]}
        axes.plot(values, places, **looks)
    elif one.kind == "outline":
        looks |= {"facecolor": "none", "edgecolor": FAINT}
        axes.barh(places, values, height=0.3, **looks)
    else:
        axes.barh(places, values, height=0.24, color=colour, **looks)


def _words(one: Series) -> str:
    """What a series shows."""
    points, heights = one.points, [y for _, y in one.points]
    (first, start), (last, end) = points[0], points[-1]
    return (
        f"{one.name}: {counted(len(points), 'point')}, {number(start)} at "
        f"{number(first)}, {number(end)} at {number(last)}, lowest "
        f"{number(min(heights))}, highest {number(max(heights))}"
    )
