"""Draws accuracy over sparsity from the records of ``one_shot.py``.

    python scripts/one_shot.py mlp --checkpoint=FILE --out=mlp.jsonl
    python scripts/one_shot.py mlp_joint --checkpoint=FILE --out=joint.jsonl
    python scripts/plot_one_shot.py mlp.jsonl joint.jsonl --out=docs/images/mnist.svg

Mean of top-1 over the seeds, and their range, up to a sparsity (default 0.95), in
colours that are readable on light and on dark pages.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

LINES = {
    "woodfisher, joint": ("WoodFisher, joint update", "#E8741E", "-", "D"),
    "woodfisher, sum": ("WoodFisher", "#2F8FDD", "-", "o"),
    "globalmagni": ("global magnitude", "#8A8A8A", "--", "s"),
}
"""Method of a record -> label, colour, line and marker, best first."""

INK = "#808080"
"""Of axes and text: as far from white as from black."""


def records(paths: list[Path]) -> list[dict[str, Any]]:
    """All lines of the files."""
    return [
        json.loads(line)
        for path in paths
        for line in path.read_text().split("\n")
        if line
    ]


def draw(found: list[dict[str, Any]], up_to: float) -> Figure:
    """The figure.

    Args:
        found: Records of one_shot.py.
        up_to: The highest sparsity that is drawn.

    Raises:
        ValueError: If the records lack a method of LINES or the dense network.
    """
    known = {record["method"] for record in found}
    if missing := {*LINES, "dense"} - known:
        raise ValueError(f"no records of {sorted(missing)}; there are {sorted(known)}")
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    axes = figure.subplots()
    dense = next(r["top1"] for r in found if r["method"] == "dense")
    axes.axhline(dense, color=INK, linewidth=1, linestyle=":")
    axes.text(50, dense + 0.3, f"dense, {dense:.2f} %", color=INK, va="bottom")
    for method, (label, colour, line, marker) in LINES.items():
        mine = [r for r in found if r["method"] == method and r["target"] <= up_to]
        levels = sorted({r["target"] for r in mine})
        top1 = [[r["top1"] for r in mine if r["target"] == level] for level in levels]
        percent = 100 * np.array(levels)
        axes.plot(
            percent,
            [np.mean(values) for values in top1],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=5,
            linewidth=2,
            label=label,
        )
        lowest, highest = [min(v) for v in top1], [max(v) for v in top1]
        axes.fill_between(percent, lowest, highest, color=colour, alpha=0.25, lw=0)
    axes.set_xlabel("weights pruned, %")
    axes.set_ylabel("top-1 on MNIST, %")
    axes.set_xticks(percent)
    axes.set_ylim(top=dense + 2)
    axes.grid(color=INK, alpha=0.25)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    legend = axes.legend(loc="lower left", frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
    return figure


def main() -> None:
    """Reads the records and writes the picture."""
    parser = argparse.ArgumentParser(description="Accuracy over sparsity, drawn.")
    parser.add_argument("records", nargs="+", type=Path, help="files of one_shot.py")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    parser.add_argument("--up_to", type=float, default=0.95, help="highest sparsity")
    arguments = parser.parse_args()
    figure = draw(records(arguments.records), arguments.up_to)
    # The same bytes from the same records.
    with matplotlib.rc_context({"svg.hashsalt": "woodfisher_jax"}):
        figure.savefig(arguments.out, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
