"""Figures of a run, as PNG files: accuracy, sparsity of the layers, loss on the way.

The figures are made without pyplot, which keeps a global list of them and may look for
a display.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

PathLike = str | os.PathLike[str]
Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours without the yellow, which is faint on white: distinct for
# colour-blind readers too. Line styles repeat the distinction in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
DENSE = "#B0B0B0"
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def plot_accuracy(path: PathLike, runs: Mapping[str, Rows]) -> None:
    """Plots top-1 and sparsity over the epochs; bars if no run was trained.

    Args:
        path: the PNG to write; its folder is created where absent.
        runs: name of a run or method to its rows (see `report`): ``event``, ``epoch``,
            ``top1`` in percent, ``sparsity`` as a fraction. A row without a ``top1`` is
            left out.

    Raises:
        ValueError: no row has a ``top1``.
    """
    runs = {
        name: [row for row in rows if row.get("top1") is not None]
        for name, rows in runs.items()
    }
    runs = {name: rows for name, rows in runs.items() if rows}
    if not runs:
        raise ValueError("runs: expected rows with a top1, got none; evaluate first")
    with matplotlib.rc_context(STYLE):
        if any(row["event"] == "train" for rows in runs.values() for row in rows):
            figure = _accuracy_lines(runs)
        else:
            figure = _accuracy_bars(runs)
        _write(figure, path)


def plot_layer_sparsity(
    path: PathLike, sparsity_by_path: Mapping[str, float], title: str
) -> None:
    """Plots the sparsity of each layer of one network as horizontal bars.

    Args:
        path: the PNG to write; its folder is created where absent.
        sparsity_by_path: parameter path to the fraction of its weights that is zero;
            the first comes on top.
        title: stands above the figure.

    Raises:
        ValueError: there is no layer.
    """
    layers = _layers([sparsity_by_path])
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(layers, title)
        values = [100 * value for value in sparsity_by_path.values()]
        bars = axes.barh(range(len(layers)), values, height=0.7, color=COLORS[0])
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        _write(figure, path)


def compare_layer_sparsity(
    path: PathLike, runs: Mapping[str, Mapping[str, float]], title: str
) -> None:
    """Plots the sparsity of each layer for several methods, one dot each.

    Args:
        path: the PNG to write; its folder is created where absent.
        runs: name of a method to its ``sparsity_by_path`` (see `plot_layer_sparsity`).
        title: stands above the figure.

    Raises:
        ValueError: there is no layer.
    """
    layers = _layers(list(runs.values()))
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(layers, title)
        axes.grid(axis="y")
        for number, (name, sparsities) in enumerate(runs.items()):
            axes.plot(
                [100 * value for value in sparsities.values()],
                [layers.index(layer) for layer in sparsities],
                linestyle="",
                marker="osD^vP*"[number % 7],
                markerfacecolor="none",  # Equal values show as two shapes in one.
                markeredgewidth=1.8,
                color=COLORS[number % len(COLORS)],
                label=name,
                clip_on=False,  # A dot at 0 or 100 % stays whole.
            )
        figure.legend(loc="outside lower center", ncols=3)
        _write(figure, path)


def plot_loss_path(
    path: PathLike, losses: Mapping[str, Sequence[float]], title: str
) -> None:
    """Plots the loss from the weights before a pruning step to those after it.

    Args:
        path: the PNG to write; its folder is created where absent.
        losses: ``fractions`` of the way from 0 to 1, and at each of them the loss:
            ``train``, ``test`` (may be empty), ``quadratic`` (the local model without
            a slope) and ``with_slope``.
        title: stands above the figure.
    """
    names = {
        "train": "training",
        "quadratic": "quadratic model",
        "with_slope": "with the slope",
        "test": "test",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (key, label) in enumerate(names.items()):
            if losses[key]:
                axes.plot(
                    losses["fractions"],
                    losses[key],
                    label=label,
                    color=COLORS[number],
                    linestyle=DASHES[number],
                )
        axes.set_xlabel("share of the way from the old weights to the new")
        axes.set_ylabel("loss")
        axes.set_title(title)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=4)
        _write(figure, path)


def _accuracy_lines(runs: Mapping[str, Rows]) -> Figure:
    """Draws top-1 above and sparsity below, over the epochs, pruning steps marked."""
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for number, (name, rows) in enumerate(runs.items()):
        style: dict[str, Any] = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
        epochs = [row["epoch"] for row in rows]
        sparsity = [100 * (row.get("sparsity") or 0) for row in rows]
        upper.plot(epochs, [row["top1"] for row in rows], label=name, **style)
        lower.plot(epochs, sparsity, drawstyle="steps-post", **style)
        pruned = [row for row in rows if row["event"] == "prune"]
        upper.plot(
            [row["epoch"] for row in pruned],
            [row["top1"] for row in pruned],
            **style | {"linestyle": "", "marker": "v", "markersize": 7},
        )
    upper.plot([], [], "v", color="#555555", markersize=7, label="after pruning")
    figure.legend(loc="outside upper center", ncols=4)
    upper.set_ylabel("top-1 accuracy (%)")
    lower.set_ylabel("sparsity (%)")
    lower.set_ylim(0, 100)
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y")
    return figure


def _accuracy_bars(runs: Mapping[str, Rows]) -> Figure:
    """Draws top-1 of runs without training: dense, where known, beside pruned."""
    figure = Figure(figsize=(2.5 + 1.5 * len(runs), 4.2), layout="constrained")
    axes = figure.subplots()
    for number, rows in enumerate(runs.values()):
        pairs = [(rows[-1], COLORS[0], 0.0)]
        if rows[0]["event"] == "dense":
            pairs = [(rows[0], DENSE, -0.2), (rows[-1], COLORS[0], 0.2)]
        for row, color, shift in pairs:
            bars = axes.bar(number + shift, row["top1"], width=0.36, color=color)
            axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(
        range(len(runs)),
        [
            f"{name}\n{100 * (rows[-1].get('sparsity') or 0):.1f} % sparse"
            for name, rows in runs.items()
        ],
    )
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.set_ylim(0, 105)
    axes.set_ylabel("top-1 accuracy (%)")
    if any(rows[0]["event"] == "dense" for rows in runs.values()):
        swatches = [Patch(color=DENSE), Patch(color=COLORS[0])]
        figure.legend(
            swatches, ["dense", "pruned"], loc="outside upper center", ncols=2
        )
    return figure


def _layers(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """Lists the layers of all runs in order of first appearance."""
    layers = list(dict.fromkeys(layer for run in runs for layer in run))
    if not layers:
        raise ValueError("sparsity_by_path: expected at least one layer, got none")
    return layers


def _layer_axes(layers: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """Makes axes with one line a layer, the first on top, tall enough to read."""
    figure = Figure(figsize=(7.5, 1.6 + 0.24 * len(layers)), layout="constrained")
    axes = figure.subplots()
    names = [layer.removesuffix("/kernel") for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=9)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("sparsity (%)")
    axes.set_title(title)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return figure, axes


def _write(figure: Figure, path: PathLike) -> None:
    """Writes a figure as PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
