"""A pruned language model: its table, and its page with heat maps over depth."""

import json
import pprint
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from woodfisher_jax.report.elements import figures, tables
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.quantities import duration, fixed, percent, storage

_BLOCK = re.compile(r"layers?_(\d+)/")


def is_language(folder: Path) -> bool:
    """Whether a folder is that of a language model's run that has ended."""
    try:
        return bool(json.loads((folder / "results.json").read_text())["task"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def rows(results: Mapping[str, Any]) -> tables.Table:
    """Perplexity of each kind of text, dense and pruned."""
    dense, pruned = (results["perplexity"][name] for name in ("dense", "pruned"))
    kinds = {"all text": (dense["all"], pruned["all"])}
    for kind, value in dense["by_kind"].items():
        kinds[kind] = value, pruned["by_kind"][kind]
    cells = [[kind, *map(fixed, pair)] for kind, pair in kinds.items()]
    return ["perplexity", "dense", "pruned"], cells


def phases(results: Mapping[str, Any]) -> tables.Table:
    """Seconds of each phase."""
    cells = [[phase, fixed(s, 1)] for phase, s in results["seconds"].items()]
    return ["phase", "seconds"], [*cells, ["all", fixed(results["seconds_total"], 1)]]


def print_results(results: Mapping[str, Any]) -> None:
    """Prints how a run went.

    Args:
        results: The content of ``results.json``.
    """
    tables.print_rows(*rows(results))
    tables.print_rows(*phases(results))
    print(
        f"{results['nonzero']:,} of {results['prunable']:,} prunable weights left "
        f"({percent(results['sparsity'])} sparse); "
        f"peak memory {storage(results['peak_rss_bytes'])}"
    )


def maps(results: Mapping[str, Any]) -> dict[str, figures.Picture]:
    """Sparsity and error of each matrix over depth, by the name of their file."""
    cells: dict[str, dict[str, dict[int, float]]] = {"sparsity": {}, "error": {}}
    for layer in results["layers"]:
        found = _BLOCK.search(layer["path"])
        block = int(found[1]) if found else layer["number"]
        place = layer["path"][found.end() :] if found else layer["path"]
        for name, scale in (("sparsity", 100), ("error", 1)):
            row = cells[name].setdefault(tables.layer_name(place), {})
            row[block] = scale * layer[name]
    titles = {
        "sparsity": "Sparsity of each matrix, %",
        "error": "Squared error of its outputs, relative",
    }
    ends = {"sparsity": (0, 100), "error": (0, None)}
    return {
        name: figures.heat_map(titles[name], "block", cells[name], ends[name])
        for name in cells
    }


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run that has ended.

    Args:
        folder: Of the run.
        out: The file; default ``report.html`` in the folder, with the heat maps as PNG
            beside it.

    Returns:
        The file.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    results = json.loads((folder / "results.json").read_text())
    drawn = maps(results)
    return html.write_page(folder, _page(folder, results, drawn), drawn, out)


def _page(
    folder: Path, results: Mapping[str, Any], drawn: Mapping[str, figures.Picture]
) -> str:
    dense, pruned = (results["perplexity"][name]["all"] for name in ("dense", "pruned"))
    tokens = f"on {results['evaluation_tokens']:,} tokens"
    left = f"{results['nonzero']:,} of {results['prunable']:,} weights left"
    head = html.tiles(
        [
            ("Perplexity, dense", fixed(dense), tokens),
            ("Perplexity, pruned", fixed(pruned), tokens),
            ("Sparsity", percent(results["sparsity"]), left),
            ("Time", duration(results["seconds_total"]), "from reading to writing"),
            ("Peak memory", storage(results["peak_rss_bytes"]), "of the process"),
        ]
    )
    layers = [
        [layer["path"], percent(layer["sparsity"]), f"{layer['error']:.3g}"]
        for layer in results["layers"]
    ]
    config = pprint.pformat(results["config"], sort_dicts=False)
    sections = [
        ("Text", html.table(*rows(results), caption="Perplexity by kind of text.")),
        (
            "Layers",
            html.joined(
                [
                    html.figures(drawn.values()),
                    html.details(
                        "Table of the matrices",
                        html.table(
                            ["matrix", "sparsity", "error"],
                            layers,
                            caption="Error: squared distance of the outputs, relative.",
                        ),
                    ),
                ]
            ),
        ),
        ("Time", html.table(*phases(results), caption="Seconds of each phase.")),
        ("Config", html.code(config)),
    ]
    name = folder.absolute().name
    return html.page(f"A pruned language model: {name}", [head], sections)
