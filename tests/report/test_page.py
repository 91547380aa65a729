"""Pages hold what they are given, as text, and nothing that is fetched or run."""

import re

import pytest
from read_pages import Page

from woodfisher_jax.report import page

HOSTILE = "<script>alert('x')</script> & \"y\""


def test_everything_is_escaped() -> None:
    text = page.page(
        HOSTILE,
        [page.paragraph(HOSTILE), page.tiles([(HOSTILE, HOSTILE, HOSTILE)])],
        [
            (HOSTILE, page.table([HOSTILE], [[HOSTILE]], caption=HOSTILE)),
            ("more", page.details(HOSTILE, HOSTILE)),
        ],
    )
    found = Page(text)
    assert "<script" not in text
    # Window, heading, paragraph, tile (3), heading, link, caption, header, cell,
    # summary, content.
    assert found.words.count(HOSTILE) == 13


def test_the_reader_of_pages_sees_what_is_not_allowed() -> None:
    style = "<style></style>"
    for part in (
        "<script></script>",
        "<p onclick='x'></p>",
        "<a href='https://x'></a>",
        "<b><i></b></i>",
        "<video poster='x'></video>",
    ):
        with pytest.raises(AssertionError):
            Page(style + part)
    with pytest.raises(AssertionError):
        Page("<style>a { background: url(x) }</style>")


def test_html_is_left_as_it_is() -> None:
    assert page.escaped(page.Html("<b>")) == "<b>"
    assert page.joined(["a<", page.Html("<b>")], ", ") == "a&lt;, <b>"
    assert page.element("p", "x", class_="a", aria_label='"') == (
        '<p class="a" aria-label="&quot;">x</p>'
    )


def test_links_lead_to_sections() -> None:
    sections = [("one", page.Html("")), ("two", page.Html(""))]
    text = page.page("title", [], sections)
    links = [link for link in Page(text).links if link.startswith("#")]
    assert [f'id="{link[1:]}"' in text for link in links] == [True, True]


def test_a_table_names_its_rows_and_columns() -> None:
    text = page.table(
        ["name", "word", "number"],
        [["a", "b", "1"], ["c", "d", "2"]],
        caption="told",
        words=2,
        marked=[1],
    )
    assert text.count('scope="col"') == 3
    assert text.count('scope="row"') == 2
    assert text.count('class="number"') == 3
    assert '<tr class="marked"><th scope="row">c' in text
    assert 'aria-label="told"' in text


def luminance(colour: str) -> float:
    """Of sRGB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_what_they_are_on(dark: bool) -> None:
    """Ratios of WCAG 2: 4.5 for text, 3 for lines and shapes of charts."""
    blocks = re.findall(r":root \{(.*?)\}", page.STYLE, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[int(dark)]))

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(colours[one]), luminance(colours[other])))[::-1]
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "panel"):
        assert contrast("text", ground) > 7
        assert contrast("faint", ground) > 4.5
        for line in ("s0", "s1", "s2", "s3", "s4", "s5"):
            assert contrast(line, ground) > 4, line
    assert contrast("text", "mark") > 7
