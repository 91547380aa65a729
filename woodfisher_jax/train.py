"""The flat loop: train dense, prune on schedule, retrain, checkpoint, report.

A run is a function of its config: batches and Fisher samples are drawn from (seed,
epoch, step) and (seed, pruning step), so that a run that was killed and resumed ends
with the same bits as one that was not.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax import (
    checkpoint,
    plots,
    pruners,
    report,
)
from woodfisher_jax import config as config_
from woodfisher_jax.config import Config
from woodfisher_jax.data import batches
from woodfisher_jax.evaluate import evaluate
from woodfisher_jax.plan import Plan, Stage, prepare
from woodfisher_jax.progress import progress_bar
from woodfisher_jax.pruning import masks as masks_
from woodfisher_jax.pruning.masks import Masks
from woodfisher_jax.pruning_step import dense_copy, forecast, prune_state
from woodfisher_jax.train_step import TrainState, train_step
from woodfisher_jax.workdir import claim_workdir, log_file

logger = logging.getLogger(__name__)


class DivergedError(ArithmeticError):
    """The training loss is not finite any more."""


@dataclasses.dataclass
class Log:
    """What a checkpoint holds besides arrays: the run so far, as JSON.

    Attributes:
        step: Optimizer steps taken.
        dense: Accuracy of the dense network, once it is known.
        stages: A record of each pruning step done.
        rows: A record of each epoch and pruning step.
        seconds: Wall time spent, over all starts of the run.
    """

    step: int = 0
    dense: dict[str, float] | None = None
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def event(self) -> int:
        """Grows with everything that is saved; see :mod:`woodfisher_jax.checkpoint`."""
        return self.step + len(self.stages) + (self.dense is not None)


def run(config: Config, workdir: Path) -> dict[str, Any]:
    """Carries a run out, or on from its last checkpoint.

    Args:
        config: Checked, from :func:`woodfisher_jax.config.from_dict`.
        workdir: Where everything it leaves behind goes.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: If the config does not fit the data or the workdir.
        DivergedError: If the loss is not finite; the last checkpoint stays.
        MemoryLimitError: If a pruning step does not fit; before anything has started.
    """
    started = time.perf_counter()
    claim_workdir(workdir, config)
    with log_file(workdir), progress_bar() as progress:
        logger.info("workdir %s", workdir)
        plan, given = prepare(config, progress)
        for name, needs in forecast(plan, *given).items() if plan.stages else ():
            logger.info("%s: %s", name, report.needs_line(needs))
        with checkpoint.open_manager(workdir / "checkpoints") as manager:
            results = loop(plan, given, workdir, manager, started)
    return results


def loop(
    plan: Plan,
    given: tuple[Any, Masks],
    workdir: Path,
    manager: Any,
    started: float,
) -> dict[str, Any]:
    """The run itself: one block for each thing that can be next."""
    state, log = start_or_resume(plan, given, manager)
    spent = log.seconds
    with report.EventWriter(workdir / "tensorboard", log.rows) as events:
        while log.dense is None or log.step < plan.end or next_stage(plan, log):
            reported = len(log.rows)

            # ------------------------------------------- the dense network is ready
            if log.dense is None and log.step >= plan.dense.last_step:
                state = finish_dense(plan, state, log)

            # -------------------------------------------------------------- prune
            elif (stage := next_stage(plan, log)) and log.step >= stage.time:
                state = prune_stage(plan, state, log, stage)

            # -------------------------------------------------------------- train
            else:
                try:
                    state = train_segment(plan, state, log)
                except DivergedError as error:
                    raise DivergedError(
                        f"{error}. The last checkpoint, event "
                        f"{checkpoint.latest_event(manager)}, is in {workdir}"
                    ) from None

            # ------------------------------------------------ checkpoint and report
            log.seconds = spent + time.perf_counter() - started
            if is_due(plan, log):
                save(plan, state, log, manager)
            for row in log.rows[reported:]:
                events.write(row)
            report.write_metrics(workdir, log.rows)

    results = summarize(plan, state, log)
    write_report(workdir, results, log)
    return results


# ------------------------------------------------------------------------- the start


def start_or_resume(
    plan: Plan, given: tuple[Any, Masks], manager: Any
) -> tuple[TrainState, Log]:
    """The state of the latest checkpoint, or a fresh one."""
    variables, masks = given
    params = masks_.apply_masks(variables["params"], masks)
    event = checkpoint.latest_event(manager)
    # Before the dense network is judged, an event is a step of its training.
    is_dense = event is None or event <= plan.dense.last_step
    fresh = TrainState(
        params,
        variables.get("batch_stats", {}),
        masks,
        (plan.dense if is_dense else plan.train).tx.init(params),
    )
    if any(pruner.from_dense for pruner in plan.config.pruners.values()):
        fresh = fresh._replace(dense=dense_copy(fresh))
    if event is None:
        return fresh, Log()
    arrays, meta = checkpoint.restore(manager, event, fresh._asdict())
    log = Log(**meta["log"])
    logger.info("resumed at step %d (event %d)", log.step, event)
    return TrainState(**arrays), log


# ------------------------------------------------------------------------ the periods


def finish_dense(plan: Plan, state: TrainState, log: Log) -> TrainState:
    """Judges the dense network and starts a new optimizer for what follows."""
    log.dense = judge(plan, state)
    log.rows.append(
        {
            "event": "dense",
            "epoch": plan.train.epoch_at(log.step),
            "step": log.step,
            **log.dense,
            **_sparsities(state.masks),
        }
    )
    logger.info("dense: top-1 %.2f %%", log.dense["top1"])
    return state._replace(opt_state=plan.train.tx.init(state.params))


def next_stage(plan: Plan, log: Log) -> Stage | None:
    """The next pruning step, or None when all are done."""
    done = len(log.stages)
    return plan.stages[done] if done < len(plan.stages) else None


def prune_stage(plan: Plan, state: TrainState, log: Log, stage: Stage) -> TrainState:
    """Prunes to the level of a stage and judges the network on both sides of it."""
    started = time.perf_counter()
    if not log.rows or log.rows[-1]["step"] != log.step:
        # Within an epoch: what pruning starts from belongs in the history.
        log.rows.append(
            {
                "event": "train",
                "epoch": plan.train.epoch_at(log.step),
                "step": log.step,
                **judge(plan, state),
                **_sparsities(state.masks),
            }
        )
    top1_before = log.rows[-1]["top1"]
    if log.stages and plan.config.pruners[stage.pruner].from_dense:
        same = [done for done in log.stages if done["pruner"] == stage.pruner]
        top1_before = same[0]["top1_before"] if same else top1_before
    state, done = prune_state(plan, state, stage, log.stages)
    after = judge(plan, state)
    record = {
        "epoch": plan.train.epoch_at(log.step),
        "step": log.step,
        **done,
        "top1_before": top1_before,
        "top1_after": after["top1"],
        "seconds": time.perf_counter() - started,
    }
    log.stages.append(record)
    log.rows.append(
        {
            "event": "prune",
            "epoch": record["epoch"],
            "step": log.step,
            **after,
            "seconds": record["seconds"],
            **_sparsities(state.masks),
        }
    )
    logger.info(
        "%s: pruned to %.4f: top-1 %.2f -> %.2f %%, %.1f s",
        stage.pruner,
        record["sparsity"],
        top1_before,
        after["top1"],
        record["seconds"],
    )
    return state


def train_segment(plan: Plan, state: TrainState, log: Log) -> TrainState:
    """Trains to the next pruning step or the end of the epoch, whichever is first."""
    started = time.perf_counter()
    phase = plan.dense if log.step < plan.dense.last_step else plan.train
    first = log.step
    epoch, begun = divmod(first - phase.first_step, phase.steps_per_epoch)
    stop = first - begun + phase.steps_per_epoch
    stage = next_stage(plan, log)
    if stage is not None and stage.time > first:
        stop = min(stop, stage.time)
    decaying = stage is not None or phase.settings.weight_decay_after_pruning
    losses = []
    for step in range(begun, begun + stop - first):
        batch = batches.train_batch(
            plan.dataset,
            seed=plan.config.seed,
            epoch=phase.first_epoch + epoch,
            step=step,
            batch_size=phase.settings.batch_size,
            augment=plan.config.data.augment,
        )
        state, loss = train_step(
            state,
            batch,
            model=plan.model,
            tx=phase.tx if decaying else phase.tx_no_decay,
            label_smoothing=phase.settings.label_smoothing,
        )
        losses.append(loss)
        label = f"epoch {phase.first_epoch + epoch + 1}"
        plan.progress(label, step - begun + 1, stop - first)
    log.step = stop
    train_loss = _mean_finite(losses, first)
    epoch_ends = begun + stop - first == phase.steps_per_epoch
    if epoch_ends:
        log.rows.append(
            {
                "event": "train",
                "epoch": phase.epoch_at(stop),
                "step": stop,
                **judge(plan, state),
                "train_loss": train_loss,
                "learning_rate": float(phase.schedule(stop - phase.first_step - 1)),
                "seconds": time.perf_counter() - started,
                **_sparsities(state.masks),
            }
        )
        logger.info(
            "epoch %g: top-1 %.2f %%", log.rows[-1]["epoch"], log.rows[-1]["top1"]
        )
    return state


def _mean_finite(losses: list[jax.Array], first_step: int) -> float:
    values = np.asarray(jnp.stack(losses))
    if not np.isfinite(values).all():
        step = int(np.argmin(np.isfinite(values)))
        raise DivergedError(
            f"the training loss is {values[step]} at step {first_step + step}; lower "
            "config.train.learning_rate (or config.dense.learning_rate)"
        )
    return float(values.mean())


def judge(plan: Plan, state: TrainState) -> dict[str, float]:
    """Top-1, top-5 and loss on the test split."""
    return evaluate(
        plan.model,
        state.params,
        state.batch_stats,
        plan.dataset,
        batch_size=plan.config.eval_batch_size,
    )


def _sparsities(masks: Masks) -> dict[str, float]:
    by_path = masks_.sparsity_by_path(masks)
    return {
        "sparsity": masks_.sparsity(masks),
        **{f"sparsity/{path}": value for path, value in by_path.items()},
    }


# ---------------------------------------------------------------------------- the end


def is_due(plan: Plan, log: Log) -> bool:
    """Whether to save: after each event but epochs in between."""
    row = log.rows[-1] if log.rows else None
    if row is None or row["step"] != log.step:
        return False
    if row["event"] != "train" or log.step == plan.end:
        return True
    return round(row["epoch"]) % plan.config.checkpoint_every_epochs == 0


def save(plan: Plan, state: TrainState, log: Log, manager: Any) -> None:
    """Writes a checkpoint and waits for it."""
    checkpoint.save(
        manager,
        log.event,
        state._asdict(),
        {"log": dataclasses.asdict(log), "config": config_.to_dict(plan.config)},
        {"stage": len(log.stages), "top1": log.rows[-1]["top1"]},
    )


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
        **report.macs_record(plan.costs, state.params, state.masks),
        "seconds_total": log.seconds,
        "peak_rss_bytes": report.peak_rss_bytes(),
        **report.environment(),
        "seed": plan.config.seed,
        "config": config_.to_dict(plan.config),
    }


def target_sparsity(plan: Plan, state: TrainState) -> float | None:
    """Of all prunable weights; None where multiply-accumulates are the target."""
    goals = {stage.pruner: stage.sparsity for stage in plan.stages}
    settings = plan.config.pruners
    if any(settings[name].flops_target for name in goals):
        return None
    if len(settings) == 1:
        return goals.get("prune", 0.0)
    pruned, prunable = 0.0, masks_.count(state.masks)[1]
    for name, goal in goals.items():
        paths = pruners.selected_paths(state.params, settings[name])
        pruned += goal * sum(state.masks[path].size for path in paths)
    return pruned / prunable


def write_report(workdir: Path, results: dict[str, Any], log: Log) -> None:
    """Writes results, tables and plots, and prints the table."""
    report.write_results(workdir, results)
    if results["layers"]:
        report.write_layers(workdir, results["layers"])
    name = results["method"]
    plots.plot_accuracy(workdir / "accuracy.png", {name: log.rows})
    plots.plot_layer_sparsity(
        workdir / "sparsity.png",
        results["sparsity_by_path"],
        f"{name}, {100 * results['sparsity']:.2f} % sparse",
    )
    for number, stage in enumerate(results["stages"], 1):
        if "loss_path" in stage:
            plots.plot_loss_path(
                workdir / f"loss_path_{number}.png",
                stage["loss_path"],
                f"{stage['pruner']} {number}, {100 * stage['sparsity']:.2f} % sparse",
            )
    report.print_table(results)
