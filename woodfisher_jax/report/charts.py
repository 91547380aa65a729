"""Charts as SVG inside a page: lines, bars, histograms.

They are drawn for the width of a telephone, and larger screens show several side by
side. Colours come from the page's style sheet, so that they follow a dark screen;
dashes and shapes repeat what colours say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from woodfisher_jax.report.page import Html, element, joined
from woodfisher_jax.report.quantities import counted, scaled, significant

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 28, 44
ROW = 24
"""Height of one bar with its gap."""

STYLES = 6
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "12 4")
SHAPES = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "M0-5L5 4.5H-5Z",
    "M0 5L5-4.5H-5Z",
    "M-5-1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",
)
"""Of each style: circle, square, diamond, triangles, cross, around the origin."""


class Series(NamedTuple):
    """Points of one colour, dash and shape.

    Attributes:
        name: In the legend; "" for none.
        xs: Where the points are.
        ys: As many.
        style: Number of colour, dash and shape.
        kind: line; points (a line with a shape at each point); shapes (those alone); or
            steps (a line that keeps its height up to the next point).
        errors: Half the length of a bar through each point; none.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0
    kind: str = "line"
    errors: Sequence[float] = ()


class Bars(NamedTuple):
    """One bar, or one shape, in each row of a chart.

    Attributes:
        name: In the legend.
        values: A number a row, or None.
        style: Number of colour and shape.
        kind: bar; outline, around the bars; or shape.
    """

    name: str
    values: Sequence[float | None]
    style: int = 0
    kind: str = "bar"


class _Axes(NamedTuple):
    """From data to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    reference: tuple[str, float] | None = None,
    remark: str = "",
) -> Html:
    """Lines and points over a pair of axes.

    Args:
        title: Above the chart.
        series: At least one point in all.
        x_label: With its unit.
        y_label: With its unit.
        y_range: Default what the points take.
        reference: Name and height of a dotted line across.
        remark: Below the chart.
    """
    xs = [x for one in series for x in one.xs]
    ys = [
        y + sign * e
        for one in series
        for y, e in zip(one.ys, one.errors or [0.0] * len(one.ys), strict=True)
        for sign in (-1, 1)
    ]
    if reference:
        ys.append(reference[1])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(*(y_range or (min(ys), max(ys))))
    axes = _Axes(
        _widened(min(xs), max(xs)),
        _spanned(y_ticks, min(ys), max(ys)) if y_range is None else y_range,
    )
    whole = all(float(x).is_integer() for x in xs)  # No half epochs, nor steps.
    x_ticks = [
        x
        for x in x_ticks
        if axes.x[0] <= x <= axes.x[1] and (x.is_integer() or not whole)
    ]
    parts = [_frame(axes, x_ticks, y_ticks, x_label, y_label)]
    keys = [(one.name, _key(one)) for one in series if one.name]
    if reference:
        name, height = reference
        parts.append(_line(axes.across(axes.x[0]), WIDTH - RIGHT, axes.down(height)))
        keys.append((name, _line(0, 34, 6)))
    parts += [_series(axes, one) for one in series]
    described = [_told(one) for one in series if one.name]
    if reference:
        described.append(f"{reference[0]}: {number(reference[1])}")
    heading = f"{title}: {y_label} against {x_label}. {'; '.join(described)}."
    return _figure(title, heading, joined(parts), HEIGHT, keys, remark)


def bar_chart(
    title: str,
    labels: Sequence[str],
    bars: Sequence[Bars],
    texts: Sequence[str],
    *,
    x_label: str,
    x_max: float | None = None,
    remark: str = "",
) -> Html:
    """Horizontal bars, one row a label.

    Args:
        title: Above the chart.
        labels: Of the rows.
        bars: What each row holds, the first drawn first.
        texts: To the right of each row.
        x_label: With its unit.
        x_max: Where the axis ends; default the largest value.
        remark: Below the chart.
    """
    values = [value for one in bars for value in one.values if value is not None]
    high = x_max or max([*values, 0.0]) or 1.0
    left = min(150, 14 + max(round(7.2 * len(short(label))) for label in labels))
    right = WIDTH - 12 - round(7.2 * max(len(text) for text in texts))
    height = ROW * len(labels) + 52
    scale = (right - left) / high
    parts = []
    marks = [tick for tick in ticks(0.0, high, most=4) if tick <= high]
    for tick in marks:
        x = left + tick * scale
        parts += [
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 46}"/>',
            _text(x, height - 28, number(tick), "middle"),
        ]
    parts.append(_text((left + right) / 2, height - 8, x_label, "middle"))
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        middle = ROW * row + ROW / 2 + 4
        name = element("title", label)
        parts.append(f"<g>{name}{_text(left - 6, middle + 4, short(label), 'end')}</g>")
        parts += [_bar(one, row, left, middle, scale) for one in bars]
        parts.append(_text(WIDTH - 2, middle + 4, text, "end"))
    parts.append(
        f'<line class="axis" x1="{left}" x2="{left}" y1="4" y2="{height - 46}"/>'
    )
    keys = [(one.name, _bar_key(one)) for one in bars] if len(bars) > 1 else []
    rows = (f"{a}: {b}" for a, b in zip(labels, texts, strict=True))
    heading = f"{title}: {x_label}. {'; '.join(rows)}."
    drawing = Html("".join(parts))
    return _figure(title, heading, drawing, height, keys, remark)


def log_histogram(
    title: str,
    low: float,
    high: float,
    counts: Mapping[str, Sequence[int]],
    *,
    x_label: str,
    y_label: str,
    remark: str = "",
) -> Html:
    """Histograms over equal bins of a logarithm, one over the other.

    Args:
        title: Above the chart.
        low: log10 of the lowest edge.
        high: log10 of the highest edge.
        counts: From name to a number of each bin.
        x_label: With its unit.
        y_label: With its unit.
        remark: Below the chart.
    """
    most = max(max(numbers) for numbers in counts.values())
    y_ticks = ticks(0.0, float(most) or 1.0)
    axes = _Axes((low, high), (0.0, y_ticks[-1]))
    step = max(1, math.ceil((high - low) / 5))
    powers = [p for p in range(math.ceil(low), math.floor(high) + 1) if p % step == 0]
    x_ticks = [float(p) for p in powers]
    if not powers:
        x_ticks = [(low + high) / 2]
    names = [power_of_ten(tick) for tick in x_ticks]
    parts = [_frame(axes, x_ticks, y_ticks, x_label, y_label, names)]
    keys = []
    for style, (name, numbers) in enumerate(counts.items()):
        width = (high - low) / len(numbers)
        path = [f"M{axes.across(low):.1f} {axes.down(0):.1f}"]
        for place, count in enumerate(numbers):
            path.append(f"V{axes.down(count):.1f}")
            path.append(f"H{axes.across(low + (place + 1) * width):.1f}")
        path.append(f"V{axes.down(0):.1f}")
        looks = f'class="area c{style}" fill="currentColor" stroke="currentColor"'
        dash = f'{looks} stroke-dasharray="{DASHES[style]}"'
        parts.append(Html(f'<path {dash} d="{"".join(path)}"/>'))
        keys.append((name, Html(f'<path {dash} d="M1 1H33V11H1Z"/>')))
    told = "; ".join(f"{name}: {sum(n):,}" for name, n in counts.items())
    heading = (
        f"{title}: {y_label} by {x_label}, from {power_of_ten(low)} to "
        f"{power_of_ten(high)}. {told}."
    )
    return _figure(title, heading, joined(parts), HEIGHT, keys, remark)


def known_points(
    xs: Sequence[float], ys: Sequence[float | None]
) -> tuple[list[float], list[float]]:
    """Points without those whose height is unknown: files have none for NaN."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return [x for x, _ in points], [y for _, y in points]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at most so many within a range, and one on either side of it."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number as an axis shows it."""
    return scaled(value) if abs(value) >= 1e4 else significant(value, 4)


def power_of_ten(exponent: float) -> str:
    """10 to that power, as text."""
    digits = str.maketrans("-0123456789.", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹·")
    return "10" + f"{exponent:.3g}".translate(digits)


def short(label: str, most: int = 19) -> str:
    """A label without its middle where it is too long."""
    if len(label) <= most:
        return label
    return f"{label[: most // 2 - 1]}…{label[-(most - most // 2) :]}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with a little room, so that points do not lie on the frame."""
    room = 0.03 * (high - low) or 0.5
    return low - room, high + room


def _spanned(marks: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """From the first tick to the last, where points come that near."""
    return min(marks[0], low), max(marks[-1], high)


def _frame(
    axes: _Axes,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
) -> Html:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y_ticks:
        y = axes.down(tick)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            _text(LEFT - 6, y + 4, number(tick), "end"),
        ]
    for tick, name in zip(x_ticks, x_names or map(number, x_ticks), strict=True):
        x = axes.across(tick)
        parts += [
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" '
            f'y2="{bottom + 5}"/>',
            _text(x, bottom + 19, name, "middle"),
        ]
    parts += [
        f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>',
        _text((LEFT + right) / 2, HEIGHT - 6, x_label, "middle"),
        _text(2, 13, y_label, "start"),
    ]
    return Html("".join(parts))


def _series(axes: _Axes, one: Series) -> Html:
    points = [
        (axes.across(x), axes.down(y)) for x, y in zip(one.xs, one.ys, strict=True)
    ]
    parts = []
    if one.kind != "shapes" and len(points) > 1:
        path = "M{:.1f} {:.1f}".format(*points[0])
        for x, y in points[1:]:
            path += f"H{x:.1f}V{y:.1f}" if one.kind == "steps" else f"L{x:.1f} {y:.1f}"
        parts.append(f'<path {_stroke(one.style)} d="{path}"/>')
    for (x, _), y, error in zip(points, one.ys, one.errors, strict=False):
        if error == 0:
            continue
        top, bottom = axes.down(y + error), axes.down(y - error)
        parts.append(
            f'<path class="line c{one.style % STYLES}" stroke="currentColor" '
            f'd="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 5:.1f} {top:.1f}h10'
            f'M{x - 5:.1f} {bottom:.1f}h10"/>'
        )
    if one.kind in ("points", "shapes") or len(points) == 1:
        for (x, y), a, b in zip(points, one.xs, one.ys, strict=True):
            parts.append(_shape(one.style, x, y, f"{number(a)}, {number(b)}"))
    return Html("".join(parts))


def _stroke(style: int) -> str:
    dash = DASHES[style % STYLES]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'class="line c{style % STYLES}" stroke="currentColor"{dashes}'


def _shape(style: int, x: float, y: float, told: str = "") -> str:
    title = f"<title>{told}</title>" if told else ""
    return (
        f'<path class="dot c{style % STYLES}" fill="currentColor" '
        f'transform="translate({x:.1f} {y:.1f})" d="{SHAPES[style % STYLES]}">'
        f"{title}</path>"
    )


def _bar(one: Bars, row: int, left: float, middle: float, scale: float) -> str:
    value = one.values[row]
    if value is None:
        return ""
    if one.kind == "shape":
        return _ring(one.style, left + value * scale, middle)
    return _rectangle(one, left, value * scale, middle)


def _ring(style: int, x: float, y: float) -> str:
    return (
        f'<path class="ring c{style % STYLES}" stroke="currentColor" '
        f'transform="translate({x:.1f} {y:.1f})" d="{SHAPES[style % STYLES]}"/>'
    )


def _rectangle(one: Bars, x: float, width: float, middle: float) -> str:
    half, looks = 4.0, f'class="c{one.style % STYLES}" fill="currentColor"'
    if one.kind == "outline":
        half, looks = 5.5, 'class="outline"'
    return (
        f'<rect {looks} x="{x:.1f}" y="{middle - half:.1f}" width="{width:.1f}" '
        f'height="{2 * half}"/>'
    )


def _key(one: Series) -> Html:
    parts = []
    if one.kind != "shapes":
        parts.append(f'<path {_stroke(one.style)} d="M0 6H34"/>')
    if one.kind in ("points", "shapes"):
        parts.append(_shape(one.style, 17, 6))
    return Html("".join(parts))


def _bar_key(one: Bars) -> Html:
    if one.kind == "shape":
        return Html(_ring(one.style, 17, 6))
    return Html(_rectangle(one, 1, 32, 6))


def _line(x1: float, x2: float, y: float) -> Html:
    return Html(
        f'<line class="reference" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" '
        f'y2="{y:.1f}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _told(one: Series) -> str:
    """What a series shows, in words."""
    if not one.xs:
        return f"{one.name}: no points"
    return (
        f"{one.name}: {counted(len(one.xs), 'point')}, {number(one.ys[0])} at "
        f"{number(one.xs[0])}, {number(one.ys[-1])} at {number(one.xs[-1])}, lowest "
        f"{number(min(one.ys))}, highest {number(max(one.ys))}"
    )


def _figure(
    title: str,
    description: str,
    drawing: Html,
    height: float,
    keys: Sequence[tuple[str, Html]],
    remark: str,
) -> Html:
    svg = element(
        "svg",
        element("desc", description),
        drawing,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=description,
    )
    entries = [
        element(
            "li",
            element("svg", key, viewBox="0 0 34 12", aria_hidden="true"),
            name,
        )
        for name, key in keys
    ]
    legend = element("ul", *entries, class_="legend") if entries else ""
    caption = element("figcaption", remark) if remark else ""
    return element("figure", element("h3", title), legend, svg, caption)
