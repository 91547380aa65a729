"""Pages hold what they are given, as text, and nothing that is fetched or run."""

import pytest
from read_pages import Page

from woodfisher_jax.report.elements import markup
from woodfisher_jax.report.elements.markup import Html

HOSTILE = "<script>alert('x')</script> & \"y\""


def test_everything_is_escaped() -> None:
    text = markup.page(
        HOSTILE,
        [markup.paragraph(HOSTILE), markup.tiles([(HOSTILE, HOSTILE, HOSTILE)])],
        [
            (HOSTILE, markup.table([HOSTILE], [[HOSTILE]], caption=HOSTILE)),
            ("more", markup.details(HOSTILE, HOSTILE)),
        ],
    )
    assert "<script" not in text
    # Window, heading, paragraph, tile (3), heading, link, caption, header, cell,
    # summary, content.
    assert Page(text).words.count(HOSTILE) == 13


def test_the_reader_of_pages_sees_what_is_not_allowed() -> None:
    style = "<style></style>"
    for part in (
        "<script></script>",
        "<p onclick='x'></p>",
        "<a href='https://x'></a>",
        "<b><i></b></i>",
        "<video poster='x'></video>",
        "<svg></svg>",
        "<p id='a'></p><p id='a'></p>",
    ):
        with pytest.raises(AssertionError):
            Page(style + part.replace("'", '"'))
    with pytest.raises(AssertionError):
        Page("<style>a { background: url(x) }</style>")


def test_html_is_left_as_it_is() -> None:
    assert markup.joined(["a<", Html("<b>")]) == "a&lt;<b>"
    assert markup.element("p", "x", class_="a", aria_label='"') == (
        '<p class="a" aria-label="&quot;">x</p>'
    )


def test_links_lead_to_sections() -> None:
    text = markup.page("title", [], [("one", Html("")), ("two", Html(""))])
    links = [link for link in Page(text).links if link.startswith("#")]
    assert [f'id="{link[1:]}"' in text for link in links] == [True, True]


def test_a_table_names_its_rows_and_columns() -> None:
    headers, cells = ["name", "word", "number"], [["a", "b", "1"], ["c", "d", "2"]]
    text = markup.table(headers, cells, caption="told", words=2, marked=[1])
    assert text.count('scope="col"') == 3
    assert text.count('scope="row"') == 2
    assert text.count('class="number"') == 3
    assert '<tr class="marked"><th scope="row">c' in text
    assert 'aria-label="told"' in text
