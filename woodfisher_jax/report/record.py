"""What a run has left in its folder, finished or not."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from woodfisher_jax.report import metrics
from woodfisher_jax.training import checkpoint
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.saved_run import read_config

COMPARED = "compare-"
"""How the folders of the runs begin that a run was compared with."""

LATENCY = "latency.json"
COMMAND = "command.txt"


class RunRecord(NamedTuple):
    """A run as it can be told.

    Attributes:
        folder: Of the run.
        config: As nested dicts; fields that did not exist then have their defaults.
        finished: Whether there are results.
        results: The content of ``results.json``; of an unfinished run what is known of
            it, the rest None or empty.
        rows: Its history, see :mod:`woodfisher_jax.report.metrics`.
        command: That started it; "" where it was started from Python.
        latency: Measured by ``python -m woodfisher_jax.report``; None if not.
        compared: From method to the runs it was compared with.
    """

    folder: Path
    config: dict[str, Any]
    finished: bool
    results: dict[str, Any]
    rows: list[dict[str, Any]]
    command: str
    latency: dict[str, Any] | None
    compared: dict[str, "RunRecord"]

    @property
    def method(self) -> str:
        """The method, or the methods of several pruners."""
        return self.results["method"]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "config.json").is_file()


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and below, itself included, sorted.

    Raises:
        ValueError: If there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder (from {Path.cwd()})")
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
        raise ValueError(
            f"{folder}: no run here, nor in the folders below: there is no "
            "config.json; give the --workdir of a run, or a folder that holds some"
        )
    return found


def read_record(folder: Path) -> RunRecord:
    """Reads what a run has left.

    Args:
        folder: Of the run.

    Raises:
        ValueError: If it is none, or a file of it is damaged.
    """
    try:
        config = config_.to_dict(read_config(folder))
        rows: list[dict[str, Any]] = []
        if (folder / "metrics.jsonl").is_file():
            rows = metrics.read_metrics(folder)
        results = _json(folder / "results.json")
        latency = _json(folder / LATENCY)
    except ValueError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise ValueError(f"{where}{error}") from error
    finished = results is not None
    if results is None:
        results = _so_far(folder, config, rows)
    command = folder / COMMAND
    records = [
        read_record(path)
        for path in sorted(folder.glob(f"{COMPARED}*"))
        if is_run(path)
    ]
    return RunRecord(
        folder=folder,
        config=config,
        finished=finished,
        results=results,
        rows=rows,
        command=command.read_text().strip() if command.is_file() else "",
        latency=latency,
        compared={record.method: record for record in records},
    )


def write_command(folder: Path, command: str) -> None:
    """Writes down the command that a run was started with, if there was one."""
    if command:
        (folder / COMMAND).write_text(command + "\n")


def write_latency(folder: Path, latency: dict[str, Any]) -> None:
    """Writes what was measured of a run's products."""
    (folder / LATENCY).write_text(json.dumps(latency, indent=2) + "\n")


def _json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _so_far(folder: Path, config: dict[str, Any], rows: list[dict]) -> dict[str, Any]:
    """Results of a run that has not ended, from its rows and its last save."""
    log = _saved_log(folder)
    stages = log.get("stages") or []
    if not stages:
        # Without a save, the rows tell where it was pruned, but not how.
        stages = [
            {"pruner": "prune", **row, "top1_after": row["top1"]}
            for row in rows
            if row["event"] == "prune"
        ]
    dense = next((row for row in rows if row["event"] == "dense"), None)
    last = rows[-1] if rows else {}
    pruners = {k: v for k, v in config.items() if config_.is_pruner(k) or k == "prune"}
    prefix = "sparsity/"
    return {
        "method": " + ".join(dict.fromkeys(p["method"] for p in pruners.values())),
        "target_sparsity": None,
        "sparsity": last.get("sparsity"),
        "nonzero": None,
        "prunable": None,
        "dense": _judged(dense),
        "final": _judged(last),
        "stages": stages,
        "sparsity_by_path": {
            key.removeprefix(prefix): value
            for key, value in last.items()
            if key.startswith(prefix)
        },
        "macs": None,
        "layers": [],
        "seconds_total": log.get("seconds"),
        "peak_rss_bytes": None,
        "device": None,
        "versions": {},
    }


def _judged(row: dict[str, Any] | None) -> dict[str, Any] | None:
    if not row:
        return None
    return {key: row.get(key) for key in ("top1", "top5", "loss")}


def _saved_log(folder: Path) -> dict[str, Any]:
    if not any(folder.glob("checkpoints/*")):
        return {}
    try:
        with checkpoint.open_manager(folder / "checkpoints") as manager:
            return dict(checkpoint.read_meta(manager, None)["log"])
    except ValueError:
        return {}  # A damaged save: the rows tell less, but tell it.
