"""Charts draw each number where it belongs, and say in words what they show."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from woodfisher_jax.report import charts
from woodfisher_jax.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    STYLES,
    TOP,
    WIDTH,
    Bars,
    Series,
    bar_chart,
    line_chart,
    log_histogram,
    ticks,
)
from woodfisher_jax.report.quantities import MINUS

Drawing = ElementTree.Element


def drawing(figure: str) -> Drawing:
    """The chart of a figure, which every XML parser must read."""
    (found,) = re.findall(r'<svg class="chart".*?</svg>', figure)
    return ElementTree.fromstring(found)


def texts(figure: str) -> list[str]:
    return ["".join(text.itertext()) for text in drawing(figure).iter("text")]


def places(path: str) -> list[tuple[float, float]]:
    """The points of a path of M and L."""
    return [
        (float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)
    ]


def lines(figure: str) -> list[Drawing]:
    return [p for p in drawing(figure).iter("path") if "line" in p.get("class", "")]


def test_points_are_where_the_axes_say() -> None:
    xs, ys = [0.0, 1.0, 4.0], [10.0, 20.0, 0.0]
    figure = line_chart(
        "t",
        [Series("a", xs, ys)],
        x_label="epoch",
        y_label="y, %",
        y_range=(0.0, 20.0),
    )
    (line,) = lines(figure)
    points = np.asarray(places(line.get("d", "")))
    # Heights go from the frame's bottom to its top, whatever is between is linear.
    expected = HEIGHT - BOTTOM - np.asarray(ys) / 20 * (HEIGHT - TOP - BOTTOM)
    np.testing.assert_allclose(points[:, 1], expected, atol=0.06)
    steps = np.diff(points[:, 0])
    assert steps[1] / steps[0] == pytest.approx(3, rel=0.01)
    assert points[:, 0].min() > LEFT
    assert points[:, 0].max() < WIDTH - RIGHT
    assert {"epoch", "y, %", "0", "20"} <= set(texts(figure))


def test_whole_numbers_have_no_ticks_between() -> None:
    series = [Series("a", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
    found = texts(line_chart("t", series, x_label="x", y_label="y"))
    assert "2.5" not in found[-6:]
    halves = [Series("a", [1.0, 1.5], [1.0, 2.0])]
    assert "1.2" in texts(line_chart("t", halves, x_label="x", y_label="y"))


def test_runs_differ_in_colour_and_dash_and_shape() -> None:
    many = [
        Series(f"s{n}", [0.0, 1.0], [n, n + 1.0], n, "points") for n in range(STYLES)
    ]
    figure = line_chart("t", many, x_label="x", y_label="y")
    found = lines(figure)
    assert len({line.get("stroke-dasharray") for line in found}) == STYLES
    assert len({line.get("class") for line in found}) == STYLES
    assert len(set(charts.SHAPES)) == len(charts.DASHES) == STYLES
    assert all(f"s{n}</li>" in figure for n in range(STYLES))
    # More runs than styles begin anew.
    more = Series("x", [0.0, 1.0], [0.0, 1.0], STYLES + 1, "points")
    assert 'class="line c1"' in line_chart("t", [more], x_label="x", y_label="y")


def test_error_bars_reach_one_deviation_to_either_side() -> None:
    series = Series("a", [1.0, 2.0], [50.0, 60.0], kind="points", errors=[10.0, 0.0])
    axes = {"x_label": "x", "y_label": "y", "y_range": (0.0, 100.0)}
    bar, *rest = [
        p for p in lines(line_chart("t", [series], **axes)) if "V" in p.get("d")
    ]
    assert not rest  # None where there is no deviation.
    top, bottom = re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar.get("d", "")).groups()
    height = HEIGHT - TOP - BOTTOM
    assert float(bottom) - float(top) == pytest.approx(0.2 * height, abs=0.2)
    wide = Series("a", [1.0], [50.0], kind="points", errors=[400.0])
    found = texts(line_chart("t", [wide], x_label="x", y_label="y"))
    assert {f"{MINUS}400", "600"} <= set(found)  # The axis holds all of the bar.


def test_a_step_holds_its_height() -> None:
    series = Series("a", [0.0, 1.0], [0.0, 10.0], kind="steps")
    (line,) = lines(line_chart("t", [series], x_label="x", y_label="y"))
    assert re.fullmatch(r"M\S+ \S+H[\d.]+V[\d.]+", line.get("d", ""))


def test_one_point_and_equal_points_have_axes() -> None:
    for xs, ys in (([3.0], [5.0]), ([3.0, 3.0], [5.0, 5.0]), ([1.0, 2.0], [0.0, 0.0])):
        figure = line_chart("t", [Series("a", xs, ys)], x_label="x", y_label="y")
        assert "nan" not in figure
        assert len(texts(figure)) >= 4


def test_the_words_say_what_the_chart_shows() -> None:
    series = [Series("run <1>", [1.0, 2.0, 3.0], [5.0, 9.0, 7.0])]
    figure = line_chart(
        "Accuracy", series, x_label="epoch", y_label="top-1", reference=("dense", 9.5)
    )
    chart = drawing(figure)
    told = "".join(chart.find("desc").itertext())
    assert told == chart.get("aria-label")
    assert chart.get("role") == "img"
    for words in (
        "Accuracy: top-1 against epoch",
        "run <1>: 3 points, 5 at 1, 7 at 3, lowest 5, highest 9",
        "dense: 9.5",
    ):
        assert words in told


def test_bars_are_as_long_as_their_numbers() -> None:
    labels = ["first", "a/very/long/path/of/a/layer/kernel"]
    figure = bar_chart(
        "t",
        labels,
        [Bars("run", [25.0, 100.0]), Bars("other", [50.0, None], 1, "shape")],
        ["25.0", "100.0"],
        x_label="%",
        x_max=100.0,
        remark="told",
    )
    chart = drawing(figure)
    short, long = (float(r.get("width")) for r in chart.iter("rect"))
    assert 4 * short == pytest.approx(long, rel=0.01)
    (ring,) = [p for p in chart.iter("path") if "ring" in p.get("class", "")]
    left = next(float(r.get("x")) for r in chart.iter("rect"))
    at = float(re.search(r"translate\(([\d.]+)", ring.get("transform")).group(1))
    assert at - left == pytest.approx(2 * short, rel=0.01)
    assert "a/very/l…layer/kernel" not in texts(figure)
    assert any("…" in text and len(text) == 19 for text in texts(figure))
    assert [t.text for t in chart.iter("title")] == labels
    assert "<figcaption>told</figcaption>" in figure


def test_bars_of_nothing() -> None:
    figure = bar_chart("t", ["a"], [Bars("run", [0.0])], ["0"], x_label="x")
    (bar,) = drawing(figure).iter("rect")
    assert float(bar.get("width")) == 0


def test_an_outline_goes_around_its_bar() -> None:
    bars = [Bars("dense", [4.0], kind="outline"), Bars("sparse", [1.0])]
    figure = bar_chart("t", ["a"], bars, ["1 of 4"], x_label="x")
    outline, bar = drawing(figure).iter("rect")
    assert float(outline.get("height")) > float(bar.get("height"))
    assert float(outline.get("width")) == pytest.approx(
        4 * float(bar.get("width")), rel=0.01
    )


def test_a_histogram_has_the_area_of_its_counts() -> None:
    counts = {"removed": [10, 40, 0, 0], "kept": [0, 0, 20, 0]}
    figure = log_histogram("t", -6.0, -2.0, counts, x_label="x", y_label="weights")
    areas = [p for p in drawing(figure).iter("path") if "area" in p.get("class", "")]
    for path, numbers in zip(areas, counts.values(), strict=True):
        heights = [float(v) for v in re.findall(r"V([\d.]+)", path.get("d", ""))]
        floor = heights[-1]
        found = floor - np.asarray(heights[:-1])
        scale = (HEIGHT - TOP - BOTTOM) / 40
        np.testing.assert_allclose(found, scale * np.asarray(numbers), atol=0.1)
    assert {"10⁻⁵", "10⁻³", "weights"} <= set(texts(figure))
    assert "removed: 50; kept: 20" in figure


@pytest.mark.parametrize("low", [-3.7, -3.2])
def test_a_histogram_within_one_decade_has_a_tick(low: float) -> None:
    one = {"a": [0, 0]}
    figure = log_histogram("t", low, low + 0.1, one, x_label="x", y_label="y")
    assert sum(text.startswith("10") for text in texts(figure)) == 1


def test_ticks_are_round_few_and_around_the_range() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = float(rng.normal() * 10.0 ** rng.integers(-6, 6))
        high = low + float(rng.random() * 10.0 ** rng.integers(-6, 6)) + 1e-9
        found = ticks(low, high)
        step = found[1] - found[0]
        slack = 1e-6 * step + 1e-9 * abs(low)
        assert found[0] <= low + slack
        assert found[-1] >= high - slack
        assert 2 <= len(found) <= 8
    assert ticks(0.0, 100.0) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.12, 0.31) == [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]
    assert ticks(5.0, 5.0)[0] < 5 < ticks(5.0, 5.0)[-1]


def test_no_text_leaves_the_drawing_at_its_sides() -> None:
    """Seven pixels a letter is more than a letter of 13 pixels takes on average."""
    counts = {"a": [1234567, 3]}
    figures = [
        log_histogram("t", -12.3, -1.2, counts, x_label="x", y_label="weights"),
        line_chart(
            "t", [Series("a", [0.0, 1e6], [0.0001, 0.0003])], x_label="x", y_label="y"
        ),
        bar_chart("t", ["x" * 40], [Bars("a", [1e9])], ["1 G of 2 G"], x_label="x"),
    ]
    for figure in figures:
        for text in drawing(figure).iter("text"):
            width = 7 * len("".join(text.itertext()))
            share = {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
            left = float(text.get("x")) - share * width
            assert left > -8, text.text
            assert left + width < WIDTH + 8, text.text
