"""Tables on the console: a run, several runs, layers, what a pruning step needs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from woodfisher_jax.rows.needs import Needs


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints how a run went: dense, each pruning step, final.

    Args:
        results: the content of ``results.json``: ``method``, ``target_sparsity``;
            ``dense`` and ``final`` with ``top1`` in percent; ``stages``, a list of
            ``pruner``, ``epoch``, ``step``, ``target_sparsity``, ``sparsity``,
            ``top1_before``, ``top1_after``, ``seconds``; ``sparsity``, ``nonzero``,
            ``prunable``, ``macs`` (of one image, or None), ``seconds_total``,
            ``peak_rss_bytes``, ``device``. Sparsities are fractions.
        console: where to print; by default the standard output.
    """
    target = _number(_times_100(results["target_sparsity"]))
    table = Table(title=Text(f"{results['method']}, target sparsity {target} %"))
    table.add_column("")
    for column in (
        "epoch",
        "step",
        "target %",
        "sparsity %",
        "top-1 before",
        "after",
        "seconds",
    ):
        table.add_column(column, justify="right")
    table.add_row("dense", "", "", "", "", "", _number(results["dense"]["top1"]), "")
    for number, stage in enumerate(results["stages"], 1):
        table.add_row(
            f"{stage['pruner']} {number}",
            f"{stage['epoch']:g}",
            str(stage["step"]),
            _number(_times_100(stage["target_sparsity"])),
            _number(_times_100(stage["sparsity"])),
            _number(stage["top1_before"]),
            _number(stage["top1_after"]),
            _number(stage["seconds"], 1),
        )
    table.add_row(
        "final",
        "",
        "",
        "",
        _number(_times_100(results["sparsity"])),
        "",
        _number(results["final"]["top1"]),
        _number(results["seconds_total"], 1),
        style="bold",
    )
    device, macs = results["device"], results["macs"]
    left = f"{results['nonzero']:,} of {results['prunable']:,} prunable weights"
    if macs:
        millions = [f"{macs[kind] / 1e6:.4g}" for kind in ("sparse", "dense")]
        left += f" and {' of '.join(millions)} M multiply-accumulates"
    table.caption = (
        f"{left} left; "
        f"peak memory {results['peak_rss_bytes'] / 1e9:.2f} GB; "
        f"{device['count']} x {device['kind']}"
    )
    (console or Console()).print(table)


def print_comparison(
    runs: Mapping[str, Mapping[str, Any]], console: Console | None = None
) -> None:
    """Prints several runs side by side, one line each.

    Args:
        runs: name of the run to its results, as in `print_table`.
        console: where to print; by default the standard output.
    """
    table = Table()
    table.add_column("run")
    table.add_column("method")
    for column in ("sparsity %", "dense top-1", "pruned", "final", "seconds"):
        table.add_column(column, justify="right")
    for name, results in runs.items():
        stages = results["stages"]
        table.add_row(
            Text(name),  # A plain string with [brackets] would be taken for markup.
            Text(results["method"]),
            _number(_times_100(results["sparsity"])),
            _number(results["dense"]["top1"]),
            _number(stages[-1]["top1_after"] if stages else None),
            _number(results["final"]["top1"]),
            _number(results["seconds_total"], 1),
        )
    (console or Console()).print(table)


def print_layers(
    layers: Iterable[Mapping[str, Any]], console: Console | None = None
) -> None:
    """Prints weights and multiply-accumulates of each layer, and their sums.

    Args:
        layers: ``layers`` of `macs_record`.
        console: where to print; by default the standard output.
    """
    layers = list(layers)
    table = Table()
    table.add_column("layer")
    for column in ("weights", "left", "sparsity %", "M MACs", "left"):
        table.add_column(column, justify="right")
    total: dict[str, Any] = {"path": "all"}
    for key in ("size", "nonzero", "dense", "sparse"):
        total[key] = sum(row[key] for row in layers)
    for row in [*layers, total]:
        table.add_row(
            Text(row["path"].removesuffix("/kernel")),
            f"{row['size']:,}",
            f"{row['nonzero']:,}",
            _number(100 * (1 - row["nonzero"] / row["size"])),
            _number(row["dense"] / 1e6, 3),
            _number(row["sparse"] / 1e6, 3),
            style="bold" if row is total else None,
        )
    (console or Console()).print(table)


def print_needs(needs: Needs, console: Console | None = None) -> None:
    """Prints what each phase of a pruning step takes.

    Args:
        needs: From :func:`woodfisher_jax.plan_pruning`.
        console: where to print; by default the standard output.
    """
    console = console or Console()
    table = Table(title="one pruning step")
    table.add_column("phase")
    for heading in ("TFLOP", "gradients moved, GB", "peak memory, GB"):
        table.add_column(heading, justify="right")
    for phase in needs.phases:
        table.add_row(
            phase.name,
            f"{phase.flops / 1e12:.3g}",
            _giga(phase.bytes_moved),
            _giga(phase.peak_bytes),
        )
    console.print(table)
    console.print(
        f"{needs_line(needs)}; microbatches of {needs.microbatch_size}",
        highlight=False,
        soft_wrap=True,
    )


def needs_line(needs: Needs) -> str:
    """The choices of a plan and its peak, in one line."""
    where = {
        "": "not kept",
        "device": "on the device",
        "host": "in host memory",
        "disk": "on disk",
        "recompute": f"formed twice, in {needs.passes} passes",
    }[needs.store]
    solvers = dict.fromkeys(solver for _, _, solver in needs.blocks)
    counts = {s: sum(n for _, n, t in needs.blocks if t == s) for s in solvers}
    return "; ".join(
        [
            f"a pruning step: {needs.num_samples} gradients of {needs.num_weights:,} "
            f"weights {where} ({_giga(needs.store_bytes)} GB {needs.store_dtype})",
            *(f"{number:,} blocks by {solver}" for solver, number in counts.items()),
            f"peak {_giga(needs.peak_bytes)} of {_giga(needs.limit_bytes)} GB",
        ]
    )


def _giga(number: float) -> str:
    return f"{number / 1e9:.3g}"


def _times_100(fraction: float | None) -> float | None:
    """Turns a fraction into percent."""
    return None if fraction is None else 100 * fraction


def _number(value: float | None, digits: int = 2) -> str:
    """Writes a number for a table cell; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
