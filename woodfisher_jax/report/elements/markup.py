"""Pieces of an HTML page that needs no other file, no script and no network."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from woodfisher_jax.report.elements.figures import COLOURS, Picture
from woodfisher_jax.written_files import replace_file


class Html(str):
    """Text that is HTML already; any other text is escaped where it meets a page."""

    __slots__ = ()


def _variables(which: int) -> str:
    return " ".join(f"--{name}: {pair[which]};" for name, pair in COLOURS.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
"""
STYLE += """
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 1180px; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.6rem; margin: .4rem 0; line-height: 1.25; }
h2 {
  font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--s0); }
nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.caption, .note { color: var(--faint); font-size: .9rem; }
.warning {
  background: var(--mark); border-left: 4px solid var(--s1); padding: .5rem .8rem;
  max-width: none;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: .6rem; margin: 1rem 0; padding: 0;
}
.tiles div {
  background: var(--panel); border-radius: 6px; padding: .6rem .8rem;
  overflow-wrap: anywhere;
}
.tiles dt { color: var(--faint); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; line-height: 1.3; }
.tiles dd small {
  display: block; font-size: .8rem; font-weight: 400; color: var(--faint);
}
.figures {
  display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr));
}
figure { margin: 0; background: var(--panel); border-radius: 6px; padding: .7rem; }
figure svg {
  display: block; width: 100%; height: auto; font-family: system-ui, sans-serif;
  stroke-linejoin: round;
}
figcaption { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; margin: 0 0 .8rem; }
table { border-collapse: collapse; font-size: .9rem; }
.caption { margin: .9rem 0 .2rem; }
th, td {
  padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top;
}
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
@media (max-width: 600px) { tbody th { white-space: normal; min-width: 5rem; } }
td.number, th.number {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
tr.marked th, tr.marked td { background: var(--mark); }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
code { white-space: nowrap; }
pre { background: var(--panel); padding: .7rem; border-radius: 6px; }
pre, pre code { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .5rem 0; }
details[open] > summary { margin-bottom: .6rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def escaped(text: str) -> Html:
    """The text as HTML; what is HTML already stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(text))


def element(name: str, *content: str, **attributes: str) -> Html:
    """An element; ``class_`` stands for ``class``, and ``_`` in names for ``-``.

    Args:
        name: Of the tag.
        *content: Texts, escaped unless they are :class:`Html`.
        **attributes: Escaped.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Parts one after the other."""
    return Html("".join(escaped(part) for part in parts))


def paragraph(*content: str, kind: str = "") -> Html:
    """A paragraph; ``kind`` is note, warning or none."""
    return element("p", *content, **({"class_": kind} if kind else {}))


def code(text: str) -> Html:
    """Lines of code, to be copied."""
    return element("pre", element("code", text))


def details(summary: str, *content: str) -> Html:
    """Content that unfolds."""
    return element("details", element("summary", summary), *content)


def figures(pictures: Iterable[Picture]) -> Html:
    """Figures with their remarks, side by side where there is room."""
    parts = [
        element(
            "figure",
            Html(one.svg()),
            element("figcaption", one.remark) if one.remark else "",
        )
        for one in pictures
    ]
    return element("div", *parts, class_="figures")


def tiles(facts: Iterable[tuple[str, str, str]]) -> Html:
    """The most important numbers: (name, value, remark) of each."""
    parts = [
        element(
            "div",
            element("dt", name),
            element("dd", value, element("small", remark) if remark else ""),
        )
        for name, value, remark in facts
    ]
    return element("dl", *parts, class_="tiles")


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    words: int = 1,
    marked: Sequence[int] = (),
) -> Html:
    """A table that scrolls on its own where it is wider than the page.

    Args:
        headers: Of the columns.
        rows: Cells; the first of each names its row.
        caption: What the table shows.
        words: How many columns, from the left, are words; the others are numbers.
        marked: Numbers of rows to set off.
    """
    alignment: list[dict[str, str]] = [
        {} if column < words else {"class_": "number"} for column in range(len(headers))
    ]
    head = [
        element("th", text, scope="col", **align)
        for text, align in zip(headers, alignment, strict=True)
    ]
    body = []
    for number, (first, *rest) in enumerate(rows):
        cells = [element("th", first, scope="row", **alignment[0])]
        cells += [
            element("td", text, **align)
            for text, align in zip(rest, alignment[1:], strict=True)
        ]
        kind = {"class_": "marked"} if number in marked else {}
        body.append(element("tr", *cells, **kind))
    content = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *body),
        aria_label=caption,
    )
    # A caption inside the table would be as wide as it, and scroll away with it.
    return joined(
        [
            paragraph(caption, kind="caption"),
            element(
                "div",
                content,
                class_="scroll",
                role="region",
                aria_label=caption,
                tabindex="0",
            ),
        ]
    )


def page(title: str, head: Iterable[str], sections: Iterable[tuple[str, str]]) -> str:
    """A whole page.

    Args:
        title: Of the window, and the first heading.
        head: What stands above the sections.
        sections: (heading, content) of each; links to them stand on top.
    """
    places = [(f"section-{n}", *pair) for n, pair in enumerate(sections, 1)]
    links = [element("a", heading, href=f"#{place}") for place, heading, _ in places]
    body = [
        element("h1", title),
        *head,
        element("nav", *links, aria_label="Sections"),
        *(
            element("section", element("h2", heading), content, id=place)
            for place, heading, content in places
        ),
    ]
    # The policy keeps the page from fetching anything, whatever it should contain.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        '<link rel="icon" href="data:,">\n'
        f"{element('title', title)}\n<style>{STYLE}</style>\n</head>\n"
        f"{element('body', *body)}\n</html>\n"
    )


def write_page(
    folder: Path, text: str, drawn: Mapping[str, Picture], out: Path | None = None
) -> Path:
    """Writes the page of a run, and its plots as PNG beside it.

    Args:
        folder: Of the run.
        text: The page.
        drawn: The plots by the names of their files.
        out: The file, without plots beside it; default ``report.html`` in the folder,
            with them.

    Returns:
        The file.
    """
    if out is None:
        for name, picture in drawn.items():
            picture.png(folder / f"{name}.png")
    out = out or folder / "report.html"
    replace_file(out, text)
    return out
