"""A page as a browser reads it, checked for what it must not contain."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

from written_runs import record_of

from woodfisher_jax.report.elements.figures import Picture
from woodfisher_jax.report.page import pictures, run_page
from woodfisher_jax.report.record import RunRecord

VOID = {"meta", "link", "br", "img"}
FETCHING = {"src", "srcset", "action", "data", "poster", "xlink:href", "background"}


class Page(HTMLParser):
    """Tags, texts, tables and figures (what is said of them) of a page.

    Raises:
        AssertionError: A tag is not closed, or something would be fetched or run.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.figures: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(set(ids)) == len(ids), "an id is there twice"
        for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
            ElementTree.fromstring(drawing)
            assert "http" not in drawing.partition(">")[2]
        for inner in re.findall(r"url\(#([^)]*)\)", text):
            assert inner in ids, inner
        style = text[text.index("<style>") : text.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names.add(tag)
        assert tag not in ("script", "iframe", "object", "embed", "img", "base"), tag
        for key, value in given.items():
            assert not key.startswith("on"), key
            assert key not in FETCHING, key
            if key == "href":
                assert value is not None
                assert value.startswith("#") or value == "data:,", value
                self.links.append(value)
        if tag == "svg":
            assert given.get("role") == "img"
            self.figures.append(given["aria-label"] or "")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        """All that can be read, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def row(self, first: str) -> list[str]:
        """The cells of the first row that begins so, over all tables."""
        return next(r for table in self.tables for r in table if r and r[0] == first)

    @property
    def titles(self) -> list[str]:
        """Of the figures."""
        return [words.partition(":")[0] for words in self.figures]

    def figure(self, title: str) -> str:
        """What is said of the first figure with a title."""
        return next(words for words in self.figures if words.startswith(f"{title}:"))


def text_of(record: RunRecord) -> str:
    """The page of a run; its figures are made, but not drawn, which takes most time."""

    def undrawn(picture: Picture) -> str:
        return f'<svg role="img" aria-label="{html.escape(picture.words)}"></svg>'

    with patch.object(Picture, "svg", undrawn):
        return run_page(record, pictures(record))


def seen(folder: Path) -> Page:
    """The page of the run in a folder, as :func:`text_of` makes it."""
    return Page(text_of(record_of(folder)))
