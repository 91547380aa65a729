"""What a run leaves in its folder, finished or not."""

import difflib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from woodfisher_jax.report import metrics
from woodfisher_jax.written_files import replace_file

COMPARED = "compare-"
"""How the folders of the runs begin that a run is compared with."""

LATENCY = "latency.json"
COMMAND = "command.txt"

Nested = dict[str, Any]


class RunRecord(NamedTuple):
    """A run as its folder describes it.

    Attributes:
        folder: Of the run.
        config: As nested dicts; what ``config.json`` lacks has its default.
        defaults: The same fields with their defaults; a further pruner's are those of
            the first one.
        finished: Whether there are results.
        results: The content of ``results.json``; of an unfinished run what is known of
            it, the rest None or empty.
        rows: Its history, see :mod:`woodfisher_jax.report.metrics`.
        command: That started it; "" where it was started from Python.
        latency: Measured by ``python -m woodfisher_jax.report``; None if not.
        compared: From method to the runs it was compared with.
    """

    folder: Path
    config: Nested
    defaults: Nested
    finished: bool
    results: Nested
    rows: list[Nested]
    command: str
    latency: Nested | None
    compared: dict[str, "RunRecord"]

    @property
    def method(self) -> str:
        """The method, or the methods of several pruners."""
        return self.results["method"]

    @property
    def runs(self) -> dict[str, "RunRecord"]:
        """The run and those it is compared with, by method."""
        return {self.method: self, **self.compared}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "config.json").is_file()


def pruners(config: Nested) -> dict[str, Nested]:
    """The sections ``prune``, ``prune_2`` and so on of a config."""
    return {name: config[name] for name in config if re.match(r"prune(_\d+)?$", name)}


def flat(config: Nested, where: str = "") -> Nested:
    """Fields by their whole names, such as ``prune.method``."""
    fields: Nested = {}
    for key, value in config.items():
        name = f"{where}.{key}" if where else key
        fields |= flat(value, name) if isinstance(value, dict) else {name: value}
    return fields


def no_run(folder: Path) -> ValueError:
    """The error for a folder that is none of a run, with the nearest that is."""
    what = "there is no run here, for it has no config.json"
    if not folder.exists():
        what = f"there is no such folder (from {Path.cwd()})"
    run = _nearest_run(folder)
    hint = f"did you mean {run}?" if run else "give the folder of a run, its --workdir"
    return ValueError(f"{folder}: {what}; {hint}")


def _nearest_run(folder: Path) -> Path | None:
    """The run with saves that holds a folder, the newest in it, or one named alike."""
    for parent in folder.parents:
        if is_run(parent) and (parent / "checkpoints").is_dir():
            return parent
    start = next(path for path in (folder, *folder.parents) if path.is_dir())
    found = [*start.glob("*/config.json"), *start.glob("*/*/config.json")]
    files = [file for file in found if (file.parent / "checkpoints").is_dir()]
    # Those of a comparison, one folder further down, are as new as their run.
    files.sort(key=lambda file: (len(file.parts), -file.stat().st_mtime))
    names = [str(file.parent.relative_to(start)) for file in files]
    wanted = "" if start == folder else str(folder.relative_to(start))
    # A letter is missing, or the time that the command line adds.
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.9)
    close += [name for name in names if name.startswith(wanted)]
    close += difflib.get_close_matches(wanted, names, n=1)
    return start / close[0] if close else None


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and below, itself included, sorted.

    Raises:
        ValueError: If there is no such folder, or no run in it.
    """
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
        raise no_run(folder)
    return found


def read_record(folder: Path, defaults: Nested) -> RunRecord:
    """Reads what a run has left.

    Args:
        folder: Of the run.
        defaults: The default config, as nested dicts.

    Raises:
        ValueError: If it is none, or a file of it is damaged.
    """
    config = _json(folder / "config.json")
    if config is None:
        raise no_run(folder)
    if "task" in config:
        raise ValueError(
            f"{folder}: it is the run of a language model, which has a page of its own "
            "and compares with no other run; leave it out"
        )
    first = {**defaults["prune"], **config.get("prune", {})}
    further = {name: first for name in pruners(config) if name != "prune"}
    own = {**defaults, **further}
    config = _filled(config, own)
    rows: list[Nested] = []
    if (folder / "metrics.jsonl").is_file():
        try:
            rows = metrics.read_metrics(folder)
        except ValueError as error:
            raise ValueError(f"{folder}/metrics.jsonl is damaged: {error}") from error
    results = _json(folder / "results.json")
    command = folder / COMMAND
    compared = [
        read_record(path, defaults)
        for path in sorted(folder.glob(f"{COMPARED}*"))
        if is_run(path)
    ]
    return RunRecord(
        folder=folder,
        config=config,
        defaults=own,
        finished=results is not None,
        results=_so_far(folder, config, rows) if results is None else results,
        rows=rows,
        command=command.read_text().strip() if command.is_file() else "",
        latency=_json(folder / LATENCY),
        compared={record.method: record for record in compared},
    )


def write_command(folder: Path, command: str) -> None:
    """Writes down the command that a run was started with, if there was one."""
    if command:
        replace_file(folder / COMMAND, command + "\n")


def write_latency(folder: Path, latency: Nested) -> None:
    """Writes what was measured of a run's products."""
    replace_file(folder / LATENCY, json.dumps(latency, indent=2) + "\n")


def _json(path: Path) -> Nested | None:
    """The content of a file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _filled(values: Nested, defaults: Nested) -> Nested:
    """Nested dicts with the defaults of what they lack, in the order of these."""
    filled = {**defaults, **values}
    for key, value in filled.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = _filled(value, defaults[key])
    return filled


def _so_far(folder: Path, config: Nested, rows: list[Nested]) -> Nested:
    """Results of a run that has not ended, from its rows and its last save."""
    log = _saved_log(folder)
    # Without a save, the rows say when it was pruned, but not how.
    pruned = [
        {"pruner": "prune", **row, "top1_after": row["top1"]}
        for row in rows
        if row["event"] == "prune"
    ]
    dense = next((row for row in rows if row["event"] == "dense"), None)
    last = rows[-1] if rows else {}
    methods = dict.fromkeys(one["method"] for one in pruners(config).values())
    prefix = "sparsity/"
    return {
        "method": " + ".join(methods),
        "target_sparsity": None,
        "sparsity": last.get("sparsity"),
        "nonzero": None,
        "prunable": None,
        "dense": _evaluated(dense),
        "final": _evaluated(last),
        "stages": log.get("stages") or pruned,
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


def _evaluated(row: Nested | None) -> Nested | None:
    return {key: row.get(key) for key in ("top1", "top5", "loss")} if row else None


def _saved_log(folder: Path) -> Nested:
    """The history in the latest save, which Orbax keeps as JSON; {} without one."""
    saves = [path for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    if not saves:
        return {}
    latest = max(saves, key=lambda path: int(path.name))
    try:
        return dict(json.loads((latest / "meta" / "metadata").read_text())["log"])
    except (OSError, ValueError, KeyError):
        return {}  # The save is damaged; the rows describe the run with less detail.
