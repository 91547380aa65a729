"""Figures stay within what is possible, name what they show, and are reproducible."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.report.elements import figures
from woodfisher_jax.report.elements.figures import (
    ANY,
    COLOURS,
    PERCENT,
    POSITIVE,
    Bars,
    Panel,
    Picture,
    Series,
    histograms,
    lines,
    rows,
)


def line(ys: list[float | None], possible: figures.Range, **looks: object) -> Picture:
    xs = [float(x) for x in range(len(ys))]
    panel = Panel("height, %", [Series("run", xs, ys, **looks)], possible)  # type: ignore[arg-type]
    return lines("Title", "epoch", [panel])


def texts(picture: Picture) -> list[str]:
    """All that can be read in a figure."""
    svg = ElementTree.fromstring(picture.svg())
    return ["".join(text.itertext()).strip() for text in svg.iter("text")]


@pytest.mark.parametrize(
    ("ys", "possible"),
    [
        ([100.0, 100.0], PERCENT),
        ([0.0, 0.0], PERCENT),
        ([3.0, 99.9], PERCENT),
        ([0.0, 0.0], POSITIVE),
        ([0.001, 2.0], POSITIVE),
    ],
)
def test_an_axis_stays_within_what_is_possible(
    ys: list[float | None], possible: figures.Range
) -> None:
    (axes,) = line(ys, possible).figure.axes
    low, high = axes.get_ylim()
    assert possible[0] <= low < high <= possible[1]
    assert low <= min(ys)  # type: ignore[type-var]
    assert high >= max(ys)  # type: ignore[type-var]
    assert axes.get_xlim()[0] == 0
    # Where no bound is near, there is room beyond the points.
    assert line([-1.0, 1.0], ANY).figure.axes[0].get_ylim()[0] < -1


def test_error_bars_do_not_widen_an_axis_beyond_its_bound() -> None:
    picture = line([99.0, 98.0], PERCENT, kind="points", errors=[5.0, 0.0])
    low, high = picture.figure.axes[0].get_ylim()
    assert high == 100
    assert low < 94  # The lower half of the bar is drawn.


def test_whole_numbers_have_no_ticks_between() -> None:
    (axes,) = line([1.0, 2.0, 3.0], POSITIVE).figure.axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    panel = Panel("y", [Series("run", [0.0, 0.5, 1.0], [1.0, 2.0, 3.0])], ANY)
    (axes,) = lines("Title", "x", [panel]).figure.axes
    assert not all(float(tick).is_integer() for tick in axes.get_xticks())


def test_unknown_heights_are_left_out_of_line_and_words() -> None:
    picture = line([5.0, None, 9.0, 7.0], PERCENT)
    (drawn,) = picture.figure.axes[0].get_lines()
    np.testing.assert_array_equal(drawn.get_xydata(), [[0, 5], [2, 9], [3, 7]])
    assert picture.words == (
        "Title: height, % against epoch. run: 3 points, 5 at 0, 7 at 3, lowest 5, "
        "highest 9."
    )


def test_a_single_point_is_seen() -> None:
    (drawn,) = line([5.0], PERCENT).figure.axes[0].get_lines()
    assert drawn.get_marker() not in ("", "None")


def test_series_differ_in_colour_and_dash_and_marker() -> None:
    many = [Series(f"s{n}", [0.0, 1.0], [n, n + 1.0], n, "points") for n in range(7)]
    picture = lines("Title", "x", [Panel("y", many, ANY, ("dense", 3.0))])
    drawn = picture.figure.axes[0].get_lines()
    for looks in ("get_color", "get_marker", "_unscaled_dash_pattern"):
        found = [getattr(one, looks) for one in drawn[:7]]
        found = [str(one() if callable(one) else one) for one in found]
        assert len(set(found)) == 6, looks
        assert found[6] == found[0]
    assert {*(f"s{n}" for n in range(7)), "dense"} <= set(texts(picture))


def test_rows_have_their_whole_names_in_the_order_given() -> None:
    names = ["stem", "block10/attention/query", "block2/" + "x" * 60]
    bars = [Bars("a", [25.0, 100.0, 0.0]), Bars("b", [50.0, None, 1.0], "marker")]
    picture = rows("Title", "share, %", names, bars, ["25", "100", "0"], 100.0)
    (axes,) = picture.figure.axes
    assert [t.get_text() for t in axes.texts[::2]] == names
    heights = [t.get_position()[1] for t in axes.texts[::2]]
    assert heights == sorted(heights)
    assert axes.yaxis_inverted()
    assert [bar.get_width() for bar in axes.patches] == [25, 100, 0]
    assert axes.get_xlim() == (0, 100)
    assert picture.words == (
        "Title: share, %. stem: 25; block10/attention/query: 100; "
        f"block2/{'x' * 60}: 0."
    )
    # No text leaves the figure.
    canvas = picture.figure.canvas
    picture.figure.draw_without_rendering()
    for text in axes.texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= canvas.get_width_height()[0] + 1


def test_histograms_have_the_areas_of_their_counts() -> None:
    counts = {"removed": [10, 40, 0, 0], "kept": [0, 0, 1200, 0]}
    picture = histograms("Title", "saliency, nats", {"low": -6, "high": -2} | counts)
    steps = [patch.get_data() for patch in picture.figure.axes[0].patches]
    for number, name in enumerate(counts):
        np.testing.assert_array_equal(steps[2 * number].values, counts[name])
        np.testing.assert_allclose(steps[2 * number].edges, [-6, -5, -4, -3, -2])
    assert {"10⁻⁵", "10⁻³", "weights", "removed", "kept"} <= set(texts(picture))
    assert picture.words == (
        "Title: weights by saliency, nats, from 10⁻⁶ to 10⁻². removed: 50; kept: 1,200."
    )


def test_svg_is_the_same_from_the_same_data_and_fetches_nothing() -> None:
    svg = line([1.0, 2.0], PERCENT).svg()
    assert svg == line([1.0, 2.0], PERCENT).svg()
    assert "http" not in svg
    assert "<style" not in svg
    assert {"Title", "height, %", "epoch", "run"} <= set(texts(line([1.0, 2.0], ANY)))
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label", "").startswith("Title: height, % against epoch. run")
    assert not {"width", "height"} & set(root.keys())
    # Colours come from the page, which has two of each.
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= COLOURS.keys()


def test_names_are_text() -> None:
    hostile = '<b> & "x" --> $y_1$'
    panel = Panel("y", [Series(hostile, [0.0, 1.0], [1.0, 2.0])], ANY)
    picture = lines(hostile, "x", [panel])
    assert texts(picture).count(hostile) == 2
    assert hostile in ElementTree.fromstring(picture.svg()).get("aria-label", "")


def test_png_is_a_picture_of_a_readable_size(tmp_path: Path) -> None:
    line([1.0, 2.0], PERCENT).png(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert 800 < image.width < 1200
        darkest, lightest = image.convert("L").getextrema()
        assert darkest < 100 < lightest


def test_pyplot_and_the_settings_of_the_caller_are_left_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    line([1.0, 2.0], PERCENT).svg()
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'woodfisher-jax\[report"):
        line([1.0, 2.0], PERCENT)


def luminance(colour: str) -> float:
    """Of sRGB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", [0, 1])
def test_colours_stand_out_from_what_they_are_on(page: int) -> None:
    """Ratios of WCAG 2: 4.5 for text, 3 for lines and shapes."""

    def contrast(one: str, other: str) -> float:
        values = (luminance(COLOURS[name][page]) for name in (one, other))
        low, high = sorted(values)
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "panel"):
        assert contrast("text", ground) > 7
        assert contrast("faint", ground) > 4.5
        for number in range(6):
            assert contrast(f"s{number}", ground) > 4
    assert contrast("text", "mark") > 7
