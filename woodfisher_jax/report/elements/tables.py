"""Tables of text: a run, several runs, layers, the plan of a pruning step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from woodfisher_jax.report.elements.quantities import (
    counted,
    duration,
    fixed,
    percent,
    scaled,
    storage,
)
from woodfisher_jax.rows.needs import Needs

Table = tuple[list[str], list[list[str]]]
"""Headers, and rows of as many cells."""


def steps(stages: Iterable[Mapping[str, Any]]) -> Table:
    """A line a pruning step, with the top-1 before and after it in percent."""
    rows = [
        [
            f"{stage['pruner']} {number}",
            f"{stage['epoch']:g}",
            f"{stage['step']:,}",
            percent(stage.get("target_sparsity")),
            percent(stage.get("sparsity")),
            fixed(stage.get("top1_before")),
            fixed(stage.get("top1_after")),
            duration(stage.get("seconds")),
        ]
        for number, stage in enumerate(stages, 1)
    ]
    headers = ["", "epoch", "step", "target", "sparsity", "top-1 before, %"]
    return [*headers, "after, %", "time"], rows


def layers(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A line a layer, and their sums: weights and multiply-accumulates (MACs).

    Args:
        rows: ``layers`` of :func:`woodfisher_jax.report.metrics.macs_record`.
    """
    rows = list(rows)
    total: dict[str, Any] = {"path": "all"}
    for key in ("size", "nonzero", "dense", "sparse"):
        total[key] = sum(row[key] for row in rows)
    cells = [
        [
            layer_name(row["path"]),
            f"{row['size']:,}",
            f"{row['nonzero']:,}",
            percent(1 - row["nonzero"] / row["size"]),
            scaled(row["dense"]),
            scaled(row["sparse"]),
        ]
        for row in [*rows, total]
    ]
    return ["layer", "weights", "left", "sparsity", "MACs, dense", "sparse"], cells


def layer_name(path: str) -> str:
    """The path of a parameter without the word that all kernels end in."""
    return path.removesuffix("/kernel")


def print_table(results: Mapping[str, Any]) -> None:
    """Prints how a run went: dense, each pruning step, final.

    Args:
        results: the content of ``results.json``: ``method``, ``target_sparsity``;
            ``dense`` and ``final`` with ``top1`` in percent; ``stages``, a list of
            ``pruner``, ``epoch``, ``step``, ``target_sparsity``, ``sparsity``,
            ``top1_before``, ``top1_after``, ``seconds``; ``sparsity``, ``nonzero``,
            ``prunable``, ``macs`` (of one image, or None), ``seconds_total``,
            ``peak_rss_bytes``, ``device``. Sparsities are fractions.
    """
    headers, rows = steps(results["stages"])
    rows.insert(0, ["dense", *[""] * 5, fixed(results["dense"]["top1"]), ""])
    level, top1 = percent(results["sparsity"]), fixed(results["final"]["top1"])
    time = duration(results["seconds_total"])
    rows.append(["final", "", "", "", level, "", top1, time])
    print(f"{results['method']}, target sparsity {percent(results['target_sparsity'])}")
    print_rows(headers, rows)
    device, macs = results["device"], results["macs"]
    left = f"{results['nonzero']:,} of {results['prunable']:,} prunable weights"
    if macs:
        sparse, dense = scaled(macs["sparse"]), scaled(macs["dense"])
        left += f" and {sparse} of {dense} multiply-accumulates"
    print(f"{left} left")
    memory = storage(results["peak_rss_bytes"])
    print(f"peak memory {memory}; {device['count']} x {device['kind']}")


def print_comparison(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints several runs side by side, one line each.

    Args:
        runs: name of the run to its results, as in `print_table`.
    """
    rows = [
        [
            name,
            results["method"],
            percent(results["sparsity"]),
            fixed(results["dense"]["top1"]),
            fixed(results["stages"][-1]["top1_after"] if results["stages"] else None),
            fixed(results["final"]["top1"]),
            duration(results["seconds_total"]),
        ]
        for name, results in runs.items()
    ]
    headers = ["run", "method", "sparsity", "dense top-1, %", "pruned, %", "final, %"]
    print_rows([*headers, "time"], rows, words=2)


def print_layers(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints :func:`layers`."""
    print_rows(*layers(rows))


def print_needs(needs: Needs) -> None:
    """Prints what each phase of a pruning step takes.

    Args:
        needs: From :func:`woodfisher_jax.plan_pruning`.
    """
    rows = [
        [
            phase.name,
            scaled(phase.flops),
            storage(phase.bytes_moved),
            storage(phase.peak_bytes),
        ]
        for phase in needs.phases
    ]
    print("one pruning step")
    print_rows(["phase", "FLOP", "gradients moved", "peak memory"], rows)
    print(f"{needs_line(needs)}; microbatches of {needs.microbatch_size}")


def print_programs(programs: Iterable[Mapping[str, Any]], memory: int) -> None:
    """Prints what compiled programs take of a device.

    Args:
        programs: of each its ``name``; bytes of ``arguments``, ``results``, ``aliased``
            (results in place of arguments) and ``temporaries``; ``flops``;
            ``collectives``, kind to number; ``seconds`` to compile; ``failure``, empty
            where it compiles.
        memory: of a device, bytes.
    """
    rows, kinds = [], {}
    for one in programs:
        taken = [one[key] for key in ("arguments", "temporaries", "aliased")]
        peak = one["arguments"] + one["results"] - one["aliased"] + one["temporaries"]
        share = "no" if one["failure"] else percent(peak / memory, 0)
        cells = [*map(storage, taken), share, scaled(one["flops"])]
        number = sum(one["collectives"].values())
        rows.append([one["name"], *cells, str(number), fixed(one["seconds"], 1)])
        kinds[one["name"]] = one["collectives"]
    headers = ["program", "arguments", "temporary", "aliased"]
    headers += [f"of {storage(memory)}", "FLOP", "collectives", "compiled, s"]
    print_rows(headers, rows)
    for name, found in kinds.items():
        if found:
            each = ", ".join(f"{number} {kind}" for kind, number in found.items())
            print(f"{name}: {each}")


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
            f"weights {where} ({storage(needs.store_bytes)}, {needs.store_dtype})",
            *(f"{counted(n, 'block')} by {solver}" for solver, n in counts.items()),
            f"peak {storage(needs.peak_bytes)} of {storage(needs.limit_bytes)}",
        ]
    )


def print_rows(
    headers: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1
) -> None:
    """Prints a table whose first columns, of words, are aligned left."""
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
