"""Several runs side by side: those that differ in their seed alone are one point."""

import json
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from woodfisher_jax.report.elements import figures
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import PERCENT, Panel, Series
from woodfisher_jax.report.elements.markup import Html, paragraph
from woodfisher_jax.report.elements.quantities import (
    NONE,
    counted,
    duration,
    fixed,
    percent,
    scaled,
)
from woodfisher_jax.report.metrics import csv_text
from woodfisher_jax.report.record import RunRecord, flat, pruners

INCIDENTAL = (
    "checkpoint_every_epochs",
    "compare_with",
    "compile_cache_dir",
    "data.dir",
    "data.prefetch",
    "data.workers",
    "distributed",
    "eval_batch_size",
    "prune.diagnostics",
    "prune.loss_path_steps",
    "prune.loss_samples",
    "prune.memory_limit_gb",
    "prune.store",
    "prune.store_dir",
    "seed",
)
"""Fields that say where a run is or what it reports, not what it does; and the seed."""

TARGETS = ("target_sparsity", "flops_target")
"""Fields of a pruner that set its level, along which a curve goes."""

NUMBERS: dict[str, tuple[str | int, ...]] = {
    "target_sparsity": ("target_sparsity",),
    "sparsity": ("sparsity",),
    "nonzero": ("nonzero",),
    "prunable": ("prunable",),
    "dense_top1": ("dense", "top1"),
    "pruned_top1": ("stages", -1, "top1_after"),
    "final_top1": ("final", "top1"),
    "final_top5": ("final", "top5"),
    "final_loss": ("final", "loss"),
    "dense_macs": ("macs", "dense"),
    "sparse_macs": ("macs", "sparse"),
    "seconds": ("seconds_total",),
    "peak_rss_bytes": ("peak_rss_bytes",),
}
"""Columns of the CSV file, and where they are in the results."""


class Spread(NamedTuple):
    """A number over the seeds.

    Attributes:
        mean: Of the runs that have it; None if none has.
        deviation: Standard deviation of one run, with n - 1; None of fewer than two.
    """

    mean: float | None
    deviation: float | None

    def text(self, digits: int = 2) -> str:
        """Mean ± standard deviation."""
        mean = fixed(self.mean, digits)
        if self.deviation is None:
            return mean
        return f"{mean} ± {fixed(self.deviation, digits)}"


class Group(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
        series: What distinguishes it from groups of other curves, such as the method.
        records: Its runs, one a seed, all finished.
    """

    series: str
    records: list[RunRecord]

    def spread(self, name: str) -> Spread:
        """One of NUMBERS over the seeds."""
        return spread([number_of(record, name) for record in self.records])


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


# ----------------------------------------------------------------------- the grouping


def compare(records: Sequence[RunRecord]) -> Comparison:
    """Groups runs by their config.

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
        identity = _identity(record.config)
        if own_start:
            del identity["init_from"]
        key = json.dumps(identity, sort_keys=True)
        fields[key] = identity
        seeds = keyed.setdefault(key, {})
        if record.config["seed"] in seeds:
            repeated.append(record)
        seeds.setdefault(record.config["seed"], record)
    names = _series_names(list(fields.values()))
    groups = [
        Group(name, list(keyed[key].values()))
        for key, name in zip(fields, names, strict=True)
    ]
    groups.sort(key=lambda g: (g.series, g.spread("sparsity").mean or 0.0))
    unfinished = [record for record in records if not record.finished]
    return Comparison(groups, list(records), repeated, unfinished)


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of the known numbers."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), deviation)


def number_of(record: RunRecord, name: str) -> float | None:
    """One of NUMBERS from the results, None where there is none."""
    value: Any = record.results
    try:
        for key in NUMBERS[name]:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that make a run what it is, but for its seed."""
    further = [name for name in pruners(config) if name != "prune"]
    left_out = [*INCIDENTAL]
    for name in INCIDENTAL:
        if name.startswith("prune."):
            left_out += [f"{section}.{name[6:]}" for section in further]
    return {
        key: value
        for key, value in flat(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


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
    """For each group what distinguishes its curve, in as few words as that takes."""
    names = []
    for one in fields:
        method = one["prune.method"]
        # Only groups of the same method have to be distinguished by its options.
        rivals = [other for other in fields if other["prune.method"] == method]
        differing = [
            key
            for key in dict.fromkeys(key for other in rivals for key in other)
            if key.rpartition(".")[2] not in TARGETS
            and any(other.get(key) != one.get(key) for other in rivals)
        ]
        rest = [f"{key.removeprefix('prune.')}={one.get(key)}" for key in differing]
        names.append(", ".join([method, *rest]))
    return names


# --------------------------------------------------------------------------- the files


def comparison_csv(comparison: Comparison) -> str:
    """A line a run, for other programs: sparsities as fractions, accuracies in percent.

    Args:
        comparison: Runs, grouped.
    """
    series = {
        record.folder: group.series
        for group in comparison.groups
        for record in group.records
    }
    states = {record.folder: "unfinished" for record in comparison.unfinished}
    states |= {record.folder: "repeated" for record in comparison.repeated}
    rows = [
        {
            "run": str(record.folder),
            "state": states.get(record.folder, "finished"),
            "series": series.get(record.folder, ""),
            "method": record.method,
            "seed": record.config["seed"],
            **{name: number_of(record, name) for name in NUMBERS},
        }
        for record in comparison.records
    ]
    return csv_text(list(rows[0]), rows)


def comparison_page(comparison: Comparison) -> str:
    """The page of several runs.

    Args:
        comparison: Runs of one data set, grouped.
    """
    records, groups = comparison.records, comparison.groups
    finished = sum(len(group.records) for group in groups)
    summary = "None of them has finished."
    if finished:
        summary = (
            f"{counted(finished, 'finished run')} in {counted(len(groups), 'group')}; "
            "runs that differ in their seed alone are one group. Given are the mean "
            "over the seeds and, after ±, the standard deviation of one run."
        )
    warnings = [paragraph(text, kind="warning") for text in _warnings(comparison)]
    sections = []
    if groups:
        sections.append(("Accuracy against sparsity", _curves(groups)))
        sections.append(("Groups", _groups(groups)))
    sections.append(("Runs", _runs(records)))
    title = f"{records[0].config['data']['name']}: {len(records)} runs compared"
    return html.page(title, [paragraph(summary), *warnings], sections)


def _warnings(comparison: Comparison) -> list[str]:
    texts = []
    for records, reason in (
        (comparison.unfinished, "Not finished, and left out of all means"),
        (
            comparison.repeated,
            "Left out, since a run of the same config and seed is there",
        ),
    ):
        if records:
            texts.append(f"{reason}: {', '.join(str(r.folder) for r in records)}.")
    models = {record.config["model"]["name"] for record in comparison.records}
    if len(models) > 1:
        texts.append(f"The runs are of several models: {', '.join(sorted(models))}.")
    return texts


def _curves(groups: Sequence[Group]) -> Html:
    records = [record for group in groups for record in group.records]
    dense = spread([number_of(record, "dense_top1") for record in records]).mean
    reference = None if dense is None else ("dense, mean", dense)
    shown = []
    for title, name in (
        ("At the end of the run", "final_top1"),
        ("Just after the last pruning step", "pruned_top1"),
    ):
        series = []
        curves = groupby(groups, lambda group: group.series)
        for style, (label, curve) in enumerate(curves):
            points = [(g.spread("sparsity").mean or 0.0, g.spread(name)) for g in curve]
            points = [(level, y) for level, y in points if y.mean is not None]
            xs, ys = [100 * level for level, _ in points], [y.mean for _, y in points]
            errors = [y.deviation or 0.0 for _, y in points]
            series.append(Series(label, xs, ys, style, "points", errors))
        if any(one.points for one in series):
            panel = Panel("top-1 on the test split, %", series, PERCENT, reference)
            label = "prunable weights that are zero, %"
            shown.append(figures.lines(title, label, [panel], PERCENT))
    bars = "Bars are one standard deviation over the seeds to either side."
    return html.joined([html.figures(shown), paragraph(bars)])


def _groups(groups: Sequence[Group]) -> Html:
    rows = [
        [
            group.series,
            percent(group.spread("sparsity").mean),
            str(len(group.records)),
            group.spread("dense_top1").text(),
            group.spread("pruned_top1").text(),
            group.spread("final_top1").text(),
            group.spread("final_loss").text(4),
            scaled(group.spread("sparse_macs").mean),
            duration(group.spread("seconds").mean),
        ]
        for group in groups
    ]
    headers = ["", "sparsity", "seeds", "dense top-1, %", "just pruned, %"]
    headers += ["final, %", "final loss, nats", "MACs", "time"]
    caption = "Means over the seeds. MACs: multiply-accumulates for one image."
    return html.table(headers, rows, caption=caption)


def _runs(records: Sequence[RunRecord]) -> Html:
    rows = [
        [
            str(record.folder),
            record.method,
            str(record.config["seed"]),
            percent(number_of(record, "sparsity")),
            *(
                fixed(number_of(record, name))
                for name in ("dense_top1", "pruned_top1", "final_top1")
            ),
            duration(number_of(record, "seconds"))
            if record.finished
            else "not finished",
        ]
        for record in records
    ]
    headers = ["run", "method", "seed", "sparsity", "dense top-1, %"]
    headers += ["just pruned, %", "final, %", "time"]
    caption = f"Every run; {NONE} where a number is unknown."
    return html.details(
        f"All {len(rows)} runs", html.table(headers, rows, caption=caption)
    )
