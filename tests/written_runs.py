"""Folders of runs as the loop leaves them, written without a loop."""

import json
from pathlib import Path
from typing import Any

import small_runs

from woodfisher_jax.report import metrics
from woodfisher_jax.report.record import RunRecord, read_record
from woodfisher_jax.training.config import Config, to_dict

DEFAULTS = to_dict(Config())
HISTOGRAM = {
    "low": -6.0,
    "high": -2.0,
    "kept": [0, 0, 30, 10],
    "removed": [5, 20, 15, 0],
    "zeros": [0, 0],
}
STAGE = {
    "pruner": "prune",
    "epoch": 2.0,
    "step": 40,
    "target_sparsity": 0.5,
    "sparsity": 0.5,
    "top1_before": 90.0,
    "top1_after": 81.0,
    "train_loss_before": 0.25,
    "train_loss_after": 0.5,
    "saliency_sum": 0.125,
    "saliency_histogram": HISTOGRAM,
    "seconds_gradients": 1.0,
    "seconds_curvature": 2.0,
    "seconds_update": 0.5,
    "seconds": 4.0,
    "store": "device",
    "store_dtype": "float32",
    "store_bytes": 4_000_000,
    "peak_bytes_planned": 9_000_000,
    "limit_bytes": 8_000_000_000,
}
LAYERS = [
    {"path": "fc1/kernel", "size": 60, "nonzero": 20, "dense": 60, "sparse": 20},
    {"path": "fc2/kernel", "size": 20, "nonzero": 20, "dense": 20, "sparse": 20},
]


def rows_of(top1: float, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an epoch, the dense network's, one a stage, and a last epoch."""

    def row(event: str, epoch: float, sparsity: float, height: float) -> dict[str, Any]:
        return {
            "event": event,
            "epoch": epoch,
            "step": round(20 * epoch),
            "top1": height,
            "top5": 99.0,
            "loss": 1 - height / 100,
            "sparsity": sparsity,
            "sparsity/fc1/kernel": sparsity,
            "sparsity/fc2/kernel": 0.0,
            **({"seconds": 3.0} if event == "train" else {}),
        }

    rows = [row("train", 1, 0, 70.0), row("train", 2, 0, 90.0), row("dense", 2, 0, 90)]
    for stage in stages:
        rows.append(row("prune", stage["epoch"], stage["sparsity"], 81.0))
    return [*rows, row("train", 3, stages[-1]["sparsity"] if stages else 0, top1)]


def record_of(folder: Path) -> RunRecord:
    """The run in a folder."""
    return read_record(folder, DEFAULTS)


def write_run(
    folder: Path,
    *,
    top1: float = 88.0,
    stages: list[dict[str, Any]] | None = None,
    rows: list[dict[str, Any]] | None = None,
    finished: bool = True,
    results: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Writes config, metrics and results of a run, and returns its folder.

    Args:
        folder: Of the run, made.
        top1: At the end, in percent.
        stages: Records of the pruning steps; default one.
        rows: The history; default one that fits.
        finished: Whether to write results.
        results: What differs in them.
        **changes: Of the config, see `small_runs`.
    """
    config = small_runs.small(**changes)
    stages = [STAGE] if stages is None else stages
    rows = rows_of(top1, stages) if rows is None else rows
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    metrics.write_metrics(folder, rows)
    if not finished:
        return folder
    sparsity = stages[-1]["sparsity"] if stages else 0.0
    found = {
        "method": config.prune.method,
        "target_sparsity": config.prune.target_sparsity,
        "sparsity": sparsity,
        "nonzero": 40,
        "prunable": 80,
        "dense": {"top1": 90.0, "top5": 99.5, "loss": 0.1},
        "final": {"top1": top1, "top5": 99.0, "loss": 0.12},
        "stages": stages,
        "sparsity_by_path": {"fc1/kernel": sparsity, "fc2/kernel": 0.0},
        "macs": {"dense": 80.0, "sparse": 40.0},
        "layers": LAYERS,
        "seconds_total": 20.0,
        "peak_rss_bytes": 1_234_000_000,
        "device": {"platform": "cpu", "kind": "a CPU", "count": 2},
        "versions": {"python": "3.11.7", "jax": "0.10.2", "woodfisher-jax": None},
        "seed": config.seed,
        "config": to_dict(config),
    }
    metrics.write_results(folder, found | (results or {}))
    return folder
