"""The numbers of a run in files: results, metrics, TensorBoard events.

A *row* is what the run logs at one moment: ``event`` (``dense``, ``prune`` or
``train``), ``epoch`` (epochs completed, whole or not), ``step`` (optimizer steps
taken), numbers such as ``loss``, ``top1`` and ``top5`` in percent, ``sparsity`` as a
fraction, ``learning_rate``, ``seconds``, ``starved`` (share of the steps for whose
batch the device had to wait), and ``sparsity/<path>`` for each tensor. A value may be
None. The *results* are one object that sums up the run.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.tracing.macs import LayerMacs, macs_table
from woodfisher_jax.written_files import replace_file

PathLike = str | os.PathLike[str]
Row = Mapping[str, Any]


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
    replace_file(Path(workdir) / "results.json", text + "\n")


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


def write_layers(workdir: PathLike, layers: Iterable[Row]) -> None:
    """Writes ``layers.csv``: weights and multiply-accumulates of each layer.

    Args:
        workdir: the run's folder, created where absent.
        layers: ``layers`` of `macs_record`.
    """
    text = csv_text(LayerMacs._fields, layers)
    replace_file(Path(workdir) / "layers.csv", text)


def write_metrics(workdir: PathLike, rows: Iterable[Row]) -> None:
    """Writes all rows of a run to ``metrics.csv`` and ``metrics.jsonl``.

    The files are rewritten from the whole history, which is in the checkpoint, so a
    resumed run neither repeats a row nor loses one.

    Args:
        workdir: the run's folder, created where absent.
        rows: the history, oldest first. The columns are the union of the keys in order
            of first appearance; what a row lacks is an empty cell.

    Raises:
        TypeError: a value has no JSON form.
    """
    plain = [_plain(row) for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in plain]
    replace_file(Path(workdir) / "metrics.csv", csv_text(columns, plain))
    replace_file(Path(workdir) / "metrics.jsonl", "".join(lines))


def csv_text(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """The text of a CSV file with a header; what a row lacks is an empty cell."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
    """Reads the rows of a run back from ``metrics.jsonl``, oldest first."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class EventWriter:
    """Writes rows as TensorBoard scalars; nothing where tensorboardX is not installed.

    Close it, or use ``contextlib.closing``.
    """

    def __init__(self, folder: PathLike, history: Iterable[Row] = ()):
        """Opens a new event file, which hides earlier ones of the folder.

        Args:
            folder: where TensorBoard looks, created where absent.
            history: rows of the run so far, written again. An exact purge would need
                more than a step: a prune and the end of an epoch can share one.
        """
        self._writer: Any = None
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            return
        self._writer = SummaryWriter(logdir=str(folder), purge_step=0)
        for row in history:
            self.write(row)

    def write(self, row: Row) -> None:
        """Writes each finite number of a row at the row's ``step``."""
        if self._writer is None:
            return
        for key, value in _plain(row).items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                self._writer.add_scalar(key, value, global_step=row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        if self._writer is not None:
            self._writer.close()


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
