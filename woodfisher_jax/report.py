"""What a run leaves behind: results, metrics, TensorBoard events, console tables.

A *row* is what the run logs at one moment: ``event`` (``dense``, ``prune`` or
``train``), ``epoch`` (epochs completed, whole or not), ``step`` (optimizer steps
taken), numbers such as ``loss``, ``top1`` and ``top5`` in percent, ``sparsity`` as a
fraction, ``learning_rate``, ``seconds``, ``starved`` (share of the steps for whose
batch the device had to wait), and ``sparsity/<path>`` for each tensor. A value may be
None. The *results* are one object that sums up the run; `print_table` reads it.
"""

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tensorboardX import SummaryWriter

from woodfisher_jax.pruning.flops import LayerMacs, macs_table
from woodfisher_jax.pruning.needs import Needs

PathLike = str | os.PathLike[str]
Row = Mapping[str, Any]

# The distributions whose versions decide what a run computes.
PACKAGES = (
    "woodfisher-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)


def write_results(workdir: PathLike, results: Mapping[str, Any]) -> None:
    """Writes ``results.json``; the file is replaced whole or not at all.

    Args:
        workdir: the run's folder, created where absent.
        results: anything JSON can hold, and NumPy or JAX numbers and arrays. NaN and
            infinities, which JSON does not know, become null.

    Raises:
        TypeError: a value has no JSON form.
    """
    text = json.dumps(_plain(results), indent=2, allow_nan=False)
    _replace(Path(workdir) / "results.json", text + "\n")


def macs_record(
    costs: Mapping[str, float] | None, params: Any, masks: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Multiply-accumulates of one image, for the results.

    Args:
        costs: of one weight of each layer; None if they could not be counted.
        params: the pytree, for the shapes.
        masks: from path to bool.

    Returns:
        ``macs`` with ``dense`` and ``sparse``, or None; and ``layers``, one object for
        each layer: ``path``, ``size``, ``nonzero``, ``per_weight``, ``dense`` and
        ``sparse`` (both multiply-accumulates).
    """
    if costs is None:
        return {"macs": None, "layers": []}
    # What is pruned but costs nothing (biases) belongs in the table too.
    rows = macs_table({**costs, **{p: costs.get(p, 0.0) for p in masks}}, params, masks)
    return {
        "macs": {
            "dense": sum(row.dense for row in rows),
            "sparse": sum(row.sparse for row in rows),
        },
        "layers": [row._asdict() for row in rows],
    }


def write_layers(workdir: PathLike, layers: Iterable[Mapping[str, Any]]) -> None:
    """Writes ``layers.csv``: weights and multiply-accumulates of each layer.

    Args:
        workdir: the run's folder, created where absent.
        layers: ``layers`` of `macs_record`.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, LayerMacs._fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(layers)
    _replace(Path(workdir) / "layers.csv", table.getvalue())


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


def write_metrics(workdir: PathLike, rows: Iterable[Row]) -> None:
    """Writes all rows of a run to ``metrics.csv`` and ``metrics.jsonl``.

    The files are written anew from the whole history, which lives in the checkpoint:
    a resumed run neither repeats a row nor loses one.

    Args:
        workdir: the run's folder, created where absent.
        rows: the history, oldest first. The columns are the union of the keys in order
            of first appearance; what a row lacks is an empty cell.

    Raises:
        TypeError: a value has no JSON form.
    """
    plain = [_plain(row) for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in plain]
    _replace(Path(workdir) / "metrics.csv", table.getvalue())
    _replace(Path(workdir) / "metrics.jsonl", "".join(lines))


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
    """Reads the rows of a run back from ``metrics.jsonl``, oldest first."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class EventWriter:
    """Writes the numbers of rows as TensorBoard scalars; close it, or use ``with``."""

    def __init__(self, folder: PathLike, history: Iterable[Row] = ()):
        """Opens a new event file and hides what the folder held before.

        Args:
            folder: where TensorBoard looks, created where absent.
            history: rows of the run so far, written again. An exact purge would need
                more than a step: a prune and the end of an epoch can share one.
        """
        self._writer = SummaryWriter(logdir=str(folder), purge_step=0)
        for row in history:
            self.write(row)

    def write(self, row: Row) -> None:
        """Writes each finite number of a row at the row's ``step``."""
        for key, value in _plain(row).items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                self._writer.add_scalar(key, value, global_step=row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def environment() -> dict[str, Any]:
    """Describes where a run takes place.

    Returns:
        ``device`` with ``platform``, ``kind`` and ``count``, over all processes; and
        ``versions`` of Python and the packages that matter, None for one that runs
        without being installed.
    """
    devices = jax.devices()
    device = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
    }
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device, "versions": versions}


def peak_rss_bytes() -> int:
    """Returns the most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kB.


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


def needs_record(needs: Needs | None) -> dict[str, Any]:
    """What a pruning step was planned to take, for its record in the results."""
    if needs is None:
        return {}
    return {
        "store": needs.store,
        "store_dtype": needs.store_dtype,
        "store_bytes": needs.store_bytes,
        "passes": needs.passes,
        "microbatch_size": needs.microbatch_size,
        "peak_bytes_planned": needs.peak_bytes,
        "limit_bytes": needs.limit_bytes,
    }


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


def _giga(number: float) -> str:
    return f"{number / 1e9:.3g}"


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


def _plain(value: Any) -> Any:
    """Turns a value into what JSON knows: NumPy and JAX away, non-finite to None."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replace(path: Path, text: str) -> None:
    """Writes a file so that at any moment the old or the new one is there whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # Else a power cut can leave the new name empty.
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _times_100(fraction: float | None) -> float | None:
    """Turns a fraction into percent."""
    return None if fraction is None else 100 * fraction


def _number(value: float | None, digits: int = 2) -> str:
    """Writes a number for a table cell; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
