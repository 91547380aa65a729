"""Sparsity and multiply-accumulates of the layers of a run."""

import re
from collections.abc import Mapping
from typing import Any

from woodfisher_jax.report.elements import figures, tables
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import PERCENT, Bars, Picture
from woodfisher_jax.report.elements.markup import Html, details, paragraph
from woodfisher_jax.report.elements.quantities import scaled
from woodfisher_jax.report.elements.tables import layer_name
from woodfisher_jax.report.record import RunRecord

_FILE = "sparsity"


def pictures(record: RunRecord) -> dict[str, Picture]:
    """The sparsity of the layers by the name of its file; {} where it is unknown.

    Args:
        record: The run.
    """
    known = record.results["sparsity_by_path"]
    return {_FILE: _sparsity(record)} if known else {}


def section(record: RunRecord, drawn: Mapping[str, Picture]) -> Html:
    """Sparsity and multiply-accumulates of each layer.

    Args:
        record: The run.
        drawn: Its figures, those of :func:`pictures` among them.
    """
    rows = record.results["layers"]
    costly = [row for row in rows if row["dense"]]
    shown = [drawn[_FILE]] if _FILE in drawn else []
    if costly:
        macs = figures.rows(
            "Multiply-accumulates",
            "for one image",
            [layer_name(row["path"]) for row in costly],
            [
                Bars("sparse", [row["sparse"] for row in costly]),
                Bars("dense", [row["dense"] for row in costly], "outline"),
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


def _sparsity(record: RunRecord) -> Picture:
    levels = _by_layer(record)
    bars: list[Bars] = []
    for name, one in record.runs.items():
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
