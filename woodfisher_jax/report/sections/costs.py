"""Wall time of a run's phases, and memory."""

from woodfisher_jax.report.elements import figures
from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import Bars
from woodfisher_jax.report.elements.markup import Html
from woodfisher_jax.report.elements.quantities import duration, storage
from woodfisher_jax.report.record import Nested, RunRecord


def section(record: RunRecord) -> Html:
    """Wall time of the phases, and memory.

    Args:
        record: The run.
    """
    phases = seconds_of_phases(record)
    parts = []
    if phases:
        bars, texts = list(phases.values()), list(map(duration, phases.values()))
        label, names = "wall time, s", list(phases)
        picture = figures.rows("Time", label, names, [Bars("", bars)], texts)
        parts.append(html.figures([picture]))
    rows = [["process, peak", storage(record.results["peak_rss_bytes"])]]
    plans = {stage["pruner"]: stage for stage in record.results["stages"]}
    for pruner, stage in plans.items():
        if stage.get("store") is None:
            continue
        gradients = "none"
        if stage["store"]:
            size = storage(stage["store_bytes"])
            gradients = f"{size} {stage['store_dtype']}, {stage['store']}"
        rows += [
            [f"{pruner}, planned", storage(stage["peak_bytes_planned"])],
            [f"{pruner}, limit", storage(stage["limit_bytes"])],
            [f"{pruner}, gradients", gradients],
        ]
    device = record.results["device"]
    if device:
        rows.append(["devices", f"{device['count']} x {device['kind']}"])
    caption = (
        "Memory. Planned: the peak of a pruning step by its memory plan; limit: what "
        "it was allowed; gradients: how many bytes of them were stored, and where."
    )
    return html.joined(
        [*parts, html.table(["", "memory"], rows, caption=caption, words=2)]
    )


def seconds_of_phases(record: RunRecord) -> dict[str, float]:
    """Wall time by phase, without those that took none; {} where it is unknown.

    Args:
        record: The run.
    """
    rows, stages = record.rows, record.results["stages"]
    total = record.results["seconds_total"]
    if total is None:
        return {}
    events = [row["event"] for row in rows]
    dense = events.index("dense") if "dense" in events else len(rows)

    def trained(part: list[Nested]) -> float:
        return sum(r.get("seconds") or 0.0 for r in part if r["event"] == "train")

    def pruned(name: str) -> float:
        return sum(stage.get(name) or 0.0 for stage in stages)

    parts = [pruned(f"seconds_{n}") for n in ("gradients", "curvature", "update")]
    phases = {
        "training, dense": trained(rows[:dense]),
        "training, pruned": trained(rows[dense:]),
        "gradients": parts[0],
        "curvature, masks": parts[1],
        "update": parts[2],
        "evaluation after pruning": pruned("seconds") - sum(parts),
    }
    phases["start, tests, saves"] = total - sum(phases.values())
    return {name: value for name, value in phases.items() if value > 0.005}
