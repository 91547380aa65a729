"""What a run writes during training and when it ends: metrics, results, plots."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.report import environment, metrics
from woodfisher_jax.report.page import write_page
from woodfisher_jax.training import config as config_
from woodfisher_jax.training import distributed, pruners
from woodfisher_jax.training.network.train_step import TrainState
from woodfisher_jax.training.plan import Plan
from woodfisher_jax.training.resuming.history import Log
from woodfisher_jax.trees import masks as masks_

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_events(workdir: Path, log: Log) -> Iterator[Callable[[list], None]]:
    """What to call with all rows so far; only the first process writes them."""
    if not distributed.is_first():
        yield lambda rows: None
        return
    written = len(log.rows)

    def write(rows: list[dict[str, Any]]) -> None:
        nonlocal written
        for row in rows[written:]:
            events.write(row)
        written = len(rows)
        metrics.write_metrics(workdir, rows)

    events = metrics.EventWriter(workdir / "tensorboard", log.rows)
    # A run that was killed may have left them behind its last save, or ahead of it.
    metrics.write_metrics(workdir, log.rows)
    with contextlib.closing(events):
        yield write


def summarize(plan: Plan, state: TrainState, log: Log) -> dict[str, Any]:
    """The content of ``results.json``."""
    kept, prunable = masks_.count(state.masks)
    methods = dict.fromkeys(p.method for p in plan.config.pruners.values())
    return {
        "method": " + ".join(methods),
        "target_sparsity": target_sparsity(plan, state),
        "sparsity": (prunable - kept) / prunable,
        "nonzero": kept,
        "prunable": prunable,
        "dense": log.dense,
        "final": {key: log.rows[-1][key] for key in ("top1", "top5", "loss")},
        "stages": log.stages,
        "sparsity_by_path": masks_.sparsity_by_path(state.masks),
        **metrics.macs_record(plan.costs, state.params, state.masks),
        "seconds_total": log.seconds,
        "peak_rss_bytes": environment.peak_rss_bytes(),
        **environment.environment(),
        "seed": plan.config.seed,
        "config": config_.to_dict(plan.config),
    }


def target_sparsity(plan: Plan, state: TrainState) -> float | None:
    """Of all prunable weights; None where multiply-accumulates are the target."""
    goals = {stage.pruner: stage.sparsity for stage in plan.stages}
    settings = plan.config.pruners
    if any(settings[name].value_of("flops_target") for name in goals):
        return None
    if len(settings) == 1:
        return goals.get("prune", 0.0)
    pruned, prunable = 0.0, masks_.count(state.masks)[1]
    for name, goal in goals.items():
        paths = pruners.selected_paths(state.params, settings[name], plan.axes)
        pruned += goal * sum(state.masks[path].size for path in paths)
    return pruned / prunable


def write_report(workdir: Path, results: dict[str, Any]) -> None:
    """Writes results and tables, and where matplotlib is installed plots and page."""
    metrics.write_results(workdir, results)
    if results["layers"]:
        metrics.write_layers(workdir, results["layers"])
    try:
        write_page(workdir, config_.to_dict(config_.Config()))
    except MissingExtraError as error:
        logger.warning("%s", error)
