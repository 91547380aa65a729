"""What happened in a run, in a few numbers: the top of its page."""

from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.markup import Html, paragraph
from woodfisher_jax.report.elements.quantities import (
    counted,
    duration,
    fixed,
    percent,
    scaled,
    storage,
)
from woodfisher_jax.report.record import Nested, RunRecord


def head(record: RunRecord) -> list[Html]:
    """What happened in a sentence, and the most important numbers.

    Args:
        record: The run.
    """
    results = record.results
    dense, final = results["dense"] or {}, results["final"] or {}
    macs = results["macs"]
    parts = [paragraph(_summary(record))]
    for number, stage in enumerate(results["stages"], 1):
        for text in stage.get("warnings") or ():
            parts.append(paragraph(f"Step {number}: {text}.", kind="warning"))
    if not record.finished:
        parts.append(paragraph(_state(record), kind="warning"))
    end, left = "final" if record.finished else "so far", ""
    if results["nonzero"] is not None:
        left = f"{results['nonzero']:,} of {results['prunable']:,} weights left"
    top1 = [_in_percent(one.get("top1")) for one in (dense, final)]
    sparse = scaled(macs["sparse"] if macs else None)
    whole = f"of {scaled(macs['dense'])}, for one image" if macs else ""
    parts.append(
        html.tiles(
            [
                ("Top-1, dense", top1[0], _dense_from(record)),
                (f"Top-1, {end}", top1[1], "on the test split"),
                ("Sparsity", percent(results["sparsity"]), left),
                ("Multiply-accumulates", sparse, whole),
                ("Time", duration(results["seconds_total"]), "over all starts"),
                ("Peak memory", storage(results["peak_rss_bytes"]), "of the process"),
            ]
        )
    )
    return parts


def _in_percent(value: float | None) -> str:
    return percent(None if value is None else value / 100)


def _summary(record: RunRecord) -> str:
    results, config = record.results, record.config
    network = f"{config['model']['name']} on {config['data']['name']}"
    if not results["stages"]:
        pruned = "nothing was pruned" if record.finished else "nothing is pruned yet"
        return f"{network}, seed {config['seed']}; {pruned}."
    steps = len(results["stages"])
    how = "in one step" if steps == 1 else f"in {steps} steps"
    return (
        f"{network}, pruned by {record.method} {how} until "
        f"{percent(results['sparsity'])} of its prunable weights were zero; seed "
        f"{config['seed']}."
    )


def _state(record: RunRecord) -> str:
    steps = counted(len(record.results["stages"]), "pruning step")
    reached = "it has not reached the end of an epoch yet"
    if record.rows:
        last = record.rows[-1]
        reached = f"it has reached epoch {last['epoch']:g}, step {last['step']:,}"
    return (
        f"This run has not finished: {reached}, with {steps} done. The page shows its "
        "state at that moment; the same command with the same --workdir resumes it."
    )


def _dense_from(record: RunRecord) -> str:
    config = record.config
    epochs = f"{config['dense']['epochs']} epochs of training"
    if config["init_from"]:
        # A classifier of another size was trained first.
        rows = record.rows if config["fit_to_data"] else []
        trained = rows and rows[0]["event"] == "train"
        return f"from {config['init_from']}" + f", {epochs}" * bool(trained)
    if not config["dense"]["epochs"]:
        return "initial weights, not trained"
    return epochs


def section(record: RunRecord) -> Html:
    """Dense against final, and against what the run was compared with.

    Args:
        record: The run.
    """
    dense = record.results["dense"]
    if dense is None:
        return paragraph("The dense network has not been evaluated yet.")

    def measured(found: Nested) -> list[str]:
        top1, top5 = fixed(found.get("top1")), fixed(found.get("top5"))
        return [top1, top5, fixed(found.get("loss"), 4)]

    rows = [["dense", percent(0.0), *measured(dense), ""]]
    for name, one in record.runs.items():
        final = one.results["final"] or {}
        known = final.get("top1") is not None and dense["top1"] is not None
        lost = fixed(dense["top1"] - final["top1"] if known else None)
        rows.append([name, percent(one.results["sparsity"]), *measured(final), lost])
    headers = ["", "sparsity", "top-1, %", "top-5, %", "loss, nats", "top-1 lost, %"]
    caption = f"On the test split. Dense: {_dense_from(record)}."
    return html.table(headers, rows, caption=caption)
