"""Several runs side by side: those that differ in their seed alone are one point."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from woodfisher_jax.report.provenance import flat
from woodfisher_jax.report.record import RunRecord
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.workdir import MACHINE

INCIDENTAL = (
    *MACHINE,
    "compare_with",
    "checkpoint_every_epochs",
    "eval_batch_size",
    "prune.diagnostics",
    "prune.loss_path_steps",
    "prune.loss_samples",
    "prune.memory_limit_gb",
    "prune.store",
    "prune.store_dir",
)
"""Fields that say where a run is or what it tells, not what it does."""

TARGETS = ("target_sparsity", "flops_target")
"""Fields of a pruner that set its level, along which a curve goes."""


class Spread(NamedTuple):
    """A figure over the seeds.

    Attributes:
        mean: Of the runs that have it; None if none has.
        deviation: Standard deviation of one run, with n - 1; None of fewer than two.
    """

    mean: float | None
    deviation: float | None


class Group(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
        series: What sets it apart from the groups of other curves, such as the method.
        fields: Of its config, by whole names, without seed and what is incidental.
        records: Its runs, one a seed, all finished.
    """

    series: str
    fields: dict[str, Any]
    records: list[RunRecord]

    def spread(self, *path: str) -> Spread:
        """A number of the results over the seeds; a path such as final, top1."""
        return spread([number_at(record, *path) for record in self.records])


class Comparison(NamedTuple):
    """Runs, grouped.

    Attributes:
        groups: By series, then by sparsity.
        records: All runs, as they were given.
        repeated: Those that have the config and the seed of one before.
        unfinished: Those without results.
    """

    groups: list[Group]
    records: list[RunRecord]
    repeated: list[RunRecord]
    unfinished: list[RunRecord]


def compare(records: Sequence[RunRecord]) -> Comparison:
    """Groups runs by what they are.

    Args:
        records: Two or more, of one data set.

    Raises:
        ValueError: If they are of several data sets.
    """
    by_data: dict[str, list[str]] = {}
    for record in records:
        by_data.setdefault(record.config["data"]["name"], []).append(str(record.folder))
    if len(by_data) > 1:
        named = "; ".join(f"{data}: {', '.join(by_data[data][:3])}" for data in by_data)
        raise ValueError(
            f"runs of several data sets, whose accuracies do not compare ({named}); "
            "give runs of one"
        )
    keyed: dict[str, dict[int, RunRecord]] = {}
    fields: dict[str, dict[str, Any]] = {}
    repeated = []
    finished = [record for record in records if record.finished]
    own_start = _starts_go_with_seeds(finished)
    for record in finished:
        found = identifying(record.config)
        if own_start:
            del found["init_from"]
        key = json.dumps(found, sort_keys=True)
        fields[key] = found
        seeds = keyed.setdefault(key, {})
        if record.config["seed"] in seeds:
            repeated.append(record)
        seeds.setdefault(record.config["seed"], record)
    names = _series_names(list(fields.values()))
    groups = [
        Group(name, fields[key], list(keyed[key].values()))
        for key, name in zip(fields, names, strict=True)
    ]
    groups.sort(key=lambda g: (g.series, g.spread("sparsity").mean or 0.0))
    unfinished = [record for record in records if not record.finished]
    return Comparison(groups, list(records), repeated, unfinished)


def identifying(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config makes a run what it is, but for its seed."""
    found = flat(config)
    pruners = [name for name in config if config_.is_pruner(name)]
    for name in INCIDENTAL:
        section, _, field = name.rpartition(".")
        for where in [section, *(pruners if section == "prune" else [])]:
            prefix = f"{where}.{field}" if where else field
            for key in [k for k in found if k == prefix or k.startswith(f"{prefix}.")]:
                del found[key]
    del found["seed"]
    return found


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of the numbers there are."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), deviation)


def number_at(record: RunRecord, *path: str) -> float | None:
    """A number of the results, None where there is none."""
    value: Any = record.results
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def just_pruned(record: RunRecord) -> float | None:
    """Top-1 after the last pruning step, before what was trained then."""
    stages = record.results["stages"]
    return stages[-1].get("top1_after") if stages else None


def csv_text(found: Comparison) -> str:
    """A line a run, for other programs.

    Args:
        found: Runs, grouped.

    Returns:
        The text of a CSV file: sparsities as fractions, accuracies in percent.
    """
    repeated = {record.folder for record in found.repeated}
    series = {
        record.folder: group.series
        for group in found.groups
        for record in group.records
    }
    lines = []
    for record in found.records:
        state = "finished" if record.finished else "unfinished"
        if record.folder in repeated:
            state = "repeated"
        lines.append(
            {
                "run": str(record.folder),
                "state": state,
                "series": series.get(record.folder, ""),
                "method": record.method,
                "seed": record.config["seed"],
                "target_sparsity": number_at(record, "target_sparsity"),
                "sparsity": number_at(record, "sparsity"),
                "nonzero": number_at(record, "nonzero"),
                "prunable": number_at(record, "prunable"),
                "dense_top1": number_at(record, "dense", "top1"),
                "pruned_top1": just_pruned(record),
                "final_top1": number_at(record, "final", "top1"),
                "final_top5": number_at(record, "final", "top5"),
                "final_loss": number_at(record, "final", "loss"),
                "dense_macs": number_at(record, "macs", "dense"),
                "sparse_macs": number_at(record, "macs", "sparse"),
                "seconds": number_at(record, "seconds_total"),
                "peak_rss_bytes": number_at(record, "peak_rss_bytes"),
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _starts_go_with_seeds(records: Sequence[RunRecord]) -> bool:
    """Whether each seed prunes a dense network of its own, all of them elsewhere."""
    starts: dict[int, set[str]] = {}
    for record in records:
        start = record.config["init_from"]
        if start is None:
            return False
        starts.setdefault(record.config["seed"], set()).add(start)
    every = set().union(*starts.values())
    number = sum(len(own) for own in starts.values())
    return len(starts) > 1 and len(every) == len(starts) == number


def _series_names(fields: Sequence[dict[str, Any]]) -> list[str]:
    """For each group what sets its curve apart, in as few words as that takes."""
    names = []
    for one in fields:
        method = one["prune.method"]
        # Of another method's options this one need not know.
        rivals = [other for other in fields if other["prune.method"] == method]
        telling = [
            key
            for key in dict.fromkeys(key for other in rivals for key in other)
            if key.rpartition(".")[2] not in TARGETS
            and any(other.get(key) != one.get(key) for other in rivals)
        ]
        rest = [f"{key.removeprefix('prune.')}={one.get(key)}" for key in telling]
        names.append(", ".join([method, *rest]))
    return names
