"""The flat loop: train dense, prune on schedule, retrain, checkpoint, report.

A run is a function of its config: batches and Fisher samples are drawn from (seed,
epoch, step) and (seed, pruning step), so that a run that was killed and resumed ends
with the same bits as one that was not.
"""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from woodfisher_jax.data import batches
from woodfisher_jax.progress import lines, live
from woodfisher_jax.report.elements import tables
from woodfisher_jax.report.record import write_command
from woodfisher_jax.rows.memory_plan import MemoryLimitError
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.training import config as config_
from woodfisher_jax.training import distributed
from woodfisher_jax.training.config import Config, ConfigError
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network.train_step import (
    Metrics,
    TrainState,
    averaged,
    averaging,
    train_step,
)
from woodfisher_jax.training.plan import Phase, Plan, Stage
from woodfisher_jax.training.pruning_step import dense_copy, forecast, prune_state
from woodfisher_jax.training.results import open_events, summarize, write_report
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.training.resuming.history import Log
from woodfisher_jax.training.resuming.preemption import (
    EXIT_CODES,
    Stopped,
    StopRequest,
    stop_requests,
)
from woodfisher_jax.training.resuming.workdir import (
    check_shared,
    claim_workdir,
    held,
    log_file,
    removed_unless_started,
)
from woodfisher_jax.training.start import fit, prepare
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.written_files import user_cache

logger = logging.getLogger(__name__)


class DivergedError(ArithmeticError):
    """The training loss is not finite."""


class RunFailedError(RuntimeError):
    """What is refused at the start has come up in the middle of a run."""


def run(
    config: Config, workdir: Path, quiet: bool = False, command: str = ""
) -> dict[str, Any]:
    """Executes a run from the start, or from its last checkpoint.

    With several processes each calls it with the same config and a workdir that all of
    them can read; the first one writes the reports.

    Args:
        config: Checked, from :func:`woodfisher_jax.training.config.from_dict`.
        workdir: Folder for all that it writes.
        quiet: Whether to show no progress; the log is written in any case.
        command: The command that started it, for its page.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: If the config does not fit the data, the devices or the workdir.
        DivergedError: If the loss is not finite; the last checkpoint stays.
        MemoryLimitError: If a pruning step does not fit; before anything has started.
        RunFailedError: If one does not fit any more, later.
        PeerLostError: If another process has ended.
        OSError: If the disk is full.
        Stopped: After SIGTERM, SIGHUP or Ctrl-C, once the run is saved.
    """
    started = time.perf_counter()
    distributed.initialize(config.distributed)
    distributed.check_config(config)
    with distributed.lost_peers_named():
        config, notes = distributed.together(fit, config)
    keep_compiled(config.compile_cache_dir)
    with distributed.lost_peers_named(), contextlib.ExitStack() as stack:
        first = distributed.is_first()
        display = live(str(workdir), lines(), quiet=quiet or not first)
        progress = stack.enter_context(display)
        made = [path for path in (workdir, *workdir.parents) if not path.exists()]
        distributed.first_only(stack.enter_context, held(workdir))
        # Once it is held, so that nobody removes the folder of another process.
        keep = stack.enter_context(removed_unless_started(made if first else ()))
        distributed.first_only(claim_workdir, workdir, config)
        distributed.together(check_shared, workdir)
        distributed.first_only(write_command, workdir, command)
        if first:
            stack.enter_context(log_file(workdir))
        request = stack.enter_context(stop_requests())
        logger.info("workdir %s", workdir)
        for note in notes:
            logger.info(note)
        plan, given = distributed.together(prepare, config, progress)
        distributed.check_equal(
            plan.dataset.num_train,
            f"the training set {plan.dataset.name} must be the same in all processes",
        )
        for name, needs in forecast(plan, *given).items() if plan.stages else ():
            logger.info("%s: %s", name, tables.needs_line(needs))
        keep()
        distributed.first_only(set_damaged_aside, workdir / "checkpoints")
        with checkpoint.open_manager(workdir / "checkpoints") as manager:
            try:
                return loop(plan, given, workdir, manager, request, started)
            except (ConfigError, MemoryLimitError) as error:
                raise RunFailedError(str(error)) from error


def loop(
    plan: Plan,
    given: tuple[Any, Masks],
    workdir: Path,
    manager: Any,
    request: StopRequest,
    started: float,
) -> dict[str, Any]:
    """The run itself: one block for each thing that can be next."""
    state, log = start_or_resume(plan, given, manager)
    spent = log.seconds
    with open_events(workdir, log) as events:
        while log.dense is None or log.step < plan.end or next_stage(plan, log):
            # ------------------------------------------- the dense network is ready
            if log.dense is None and log.step >= plan.dense.last_step:
                state = finish_dense(plan, state, log)

            # -------------------------------------------------------------- prune
            elif (stage := next_stage(plan, log)) and log.step >= stage.time:
                state = prune_stage(plan, state, log, stage)

            # -------------------------------------------------------------- train
            else:
                try:
                    state = train_segment(plan, state, log, request)
                except DivergedError as error:
                    raise DivergedError(
                        f"{error}. {last_checkpoint(workdir, manager)}"
                    ) from None

            # ------------------------------------------------ checkpoint and report
            log.seconds = spent + time.perf_counter() - started
            signal = int(distributed.gathered(request.signal).max())
            if signal or is_due(plan, log):
                save(plan, state, log, manager)
            events(log.rows)

            # ----------------------------------------------------------------- stop
            if signal:
                raise Stopped(
                    f"stopped after step {log.step}, which is saved in {workdir}",
                    EXIT_CODES[signal],
                )

    results = summarize(plan, state, log)
    if distributed.is_first():
        write_report(workdir, results)
    return results


# ------------------------------------------------------------------------- the start


def keep_compiled(folder: str | None) -> None:
    """Has JAX keep compiled programs in a folder, and take them from there.

    Args:
        folder: Where; "auto" for the one that JAX has, or one in the user's cache; None
            leaves JAX as it is.
    """
    if folder == "auto" and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = str(user_cache() / "compiled")
    if folder not in (None, "auto"):
        jax.config.update("jax_compilation_cache_dir", folder)
        # JAX by itself leaves out what compiles within a second, as most do.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def set_damaged_aside(saves: Path) -> None:
    """Sets damaged saves aside, and says so."""
    for line in checkpoint.set_damaged_aside(saves):
        logger.warning("%s; the run goes on from the save before", line)


def start_or_resume(
    plan: Plan, given: tuple[Any, Masks], manager: Any
) -> tuple[TrainState, Log]:
    """The state of the latest checkpoint, or a fresh one."""
    variables, masks = given
    params = masks_.apply_masks(variables["params"], masks)
    event = checkpoint.latest_event(manager)
    # Before the dense network is evaluated, an event is a step of its training.
    is_dense = event is None or event <= plan.dense.last_step
    phase = plan.dense if is_dense else plan.train
    fresh = TrainState(
        params, variables.get("batch_stats", {}), masks, phase.tx.init(params)
    )
    if any(pruner.keeps_dense for pruner in plan.config.pruners.values()):
        fresh = fresh._replace(dense=dense_copy(fresh))
    fresh = averaging(fresh, phase.settings.average_decay)
    fresh = replicate(fresh, plan.mesh)
    if event is None:
        return fresh, Log()
    arrays, meta = checkpoint.restore(manager, event, fresh._asdict())
    log = Log(**meta["log"])
    logger.info("resumed from checkpoint %d: %s", event, log.moment)
    return TrainState(**arrays), log


# ------------------------------------------------------------------------ the periods


def finish_dense(plan: Plan, state: TrainState, log: Log) -> TrainState:
    """Evaluates the dense network and starts a new optimizer."""
    state = averaged(state)
    log.dense = accuracy(plan, state)
    add_row(plan.train, state, log, event="dense", **log.dense)
    logger.info("dense: top-1 %.2f %%", log.dense["top1"])
    state = state._replace(opt_state=plan.train.tx.init(state.params))
    state = averaging(state, plan.train.settings.average_decay)
    return replicate(state, plan.mesh)


def next_stage(plan: Plan, log: Log) -> Stage | None:
    """The next pruning step, or None when all are done."""
    done = len(log.stages)
    return plan.stages[done] if done < len(plan.stages) else None


def prune_stage(plan: Plan, state: TrainState, log: Log, stage: Stage) -> TrainState:
    """Prunes to the level of a stage; evaluates the network before and after."""
    started = time.perf_counter()
    state = averaged(state)
    if not log.rows or log.rows[-1]["step"] != log.step:
        # Within an epoch there is no record yet of the network before pruning.
        add_row(plan.train, state, log, event="train", **accuracy(plan, state))
    top1_before = log.rows[-1]["top1"]
    if log.stages and plan.config.pruners[stage.pruner].from_dense:
        same = [done for done in log.stages if done["pruner"] == stage.pruner]
        top1_before = same[0]["top1_before"] if same else top1_before
    state, done = prune_state(plan, state, stage, log.stages)
    state = averaging(state, plan.train.settings.average_decay)
    after = accuracy(plan, state)
    record = {
        "epoch": plan.train.epoch_at(log.step),
        "step": log.step,
        **done,
        "top1_before": top1_before,
        "top1_after": after["top1"],
        "seconds": time.perf_counter() - started,
    }
    log.stages.append(record)
    after["seconds"] = record["seconds"]
    add_row(plan.train, state, log, event="prune", **after)
    logger.info(
        "%s: pruned to %.2f %%: top-1 %.2f -> %.2f %%, %.1f s",
        stage.pruner,
        100 * record["sparsity"],
        top1_before,
        after["top1"],
        record["seconds"],
    )
    return state


def train_segment(
    plan: Plan, state: TrainState, log: Log, request: StopRequest
) -> TrainState:
    """Trains to the next pruning step, the end of the epoch or a request to stop."""
    started = time.perf_counter()
    phase = plan.dense if log.step < plan.dense.last_step else plan.train
    settings, stage = phase.settings, next_stage(plan, log)
    epoch, begun = divmod(log.step - phase.first_step, phase.steps_per_epoch)
    end = phase.steps_per_epoch
    if stage is not None and stage.time > log.step:
        end = min(end, begun + stage.time - log.step)
    decaying = stage is not None or settings.weight_decay_after_pruning
    label = f"epoch {phase.first_epoch + epoch + 1}, steps"
    running: tuple[int, Metrics] | None = None
    plan.progress(label, 0, end - begun)
    for batch in batches.epoch_batches(
        plan.dataset,
        seed=plan.config.seed,
        epoch=phase.first_epoch + epoch,
        start=begun,
        stop=end,
        batch_size=settings.batch_size,
        augment=plan.config.data.augment,
        shard=distributed.shard(),
    ):
        before = running
        log.starved_steps += before is not None and is_done(before[1])
        state, metrics = train_step(
            state,
            distributed.spread(batch, plan.mesh),
            distributed.per_device(request.signal, plan.mesh),
            model=phase.model,
            tx=phase.tx if decaying else phase.tx_no_decay,
            label_smoothing=settings.label_smoothing,
            accumulation_steps=settings.accumulation_steps,
            average_decay=settings.average_decay,
        )
        running = log.step, metrics
        log.step += 1
        # While this step runs the next batch is read, and none after it.
        if before is not None and finish_step(*before, log):
            break
        done = log.step - phase.first_step - epoch * phase.steps_per_epoch - begun
        plan.progress(label, done, end - begun)
    if running is not None:
        finish_step(*running, log)
    log.epoch_seconds += time.perf_counter() - started
    if (log.step - phase.first_step) % phase.steps_per_epoch == 0:
        finish_epoch(plan, phase, state, log)
    return state


def is_done(metrics: Metrics) -> bool:
    """Whether a step has ended, so that its device waits for the next one."""
    return bool(metrics.loss.is_ready())  # type: ignore[attr-defined]


def finish_step(step: int, metrics: Metrics, log: Log) -> bool:
    """Waits for a step and records its loss; True if some process has to stop.

    Raises:
        DivergedError: If the loss is not finite.
    """
    loss = float(metrics.loss)
    if not np.isfinite(loss):
        raise DivergedError(
            f"the training loss is {loss} at step {step}; lower "
            "config.train.learning_rate (or config.dense.learning_rate)"
        )
    log.losses.append(loss)
    return float(metrics.stop) > 0


def finish_epoch(plan: Plan, phase: Phase, state: TrainState, log: Log) -> None:
    """Evaluates the network after an epoch."""
    row = add_row(
        phase,
        state,
        log,
        event="train",
        **accuracy(plan, state),
        train_loss=float(np.mean(np.asarray(log.losses, np.float32))),
        learning_rate=float(phase.schedule(log.step - phase.first_step - 1)),
        seconds=log.epoch_seconds,
        starved=log.starved_steps / phase.steps_per_epoch,
    )
    log.losses, log.epoch_seconds, log.starved_steps = [], 0.0, 0
    logger.info(
        "epoch %g: top-1 %.2f %%, training loss %.4f, %.1f s, %.0f images/s",
        row["epoch"],
        row["top1"],
        row["train_loss"],
        row["seconds"],
        phase.steps_per_epoch * phase.settings.batch_size / row["seconds"],
    )


def accuracy(plan: Plan, state: TrainState) -> dict[str, float]:
    """Top-1, top-5 and loss on the test split; of the average, where there is one."""
    state = averaged(state)
    return evaluate(
        plan.model,
        state.params,
        state.batch_stats,
        plan.dataset,
        batch_size=plan.config.eval_batch_size,
        mesh=plan.mesh,
    )


def add_row(
    phase: Phase, state: TrainState, log: Log, *, event: str, **values: float
) -> dict[str, Any]:
    """Adds a record of the network as it is now to the history."""
    by_path = masks_.sparsity_by_path(state.masks)
    row: dict[str, Any] = {
        "event": event,
        "epoch": phase.epoch_at(log.step),
        "step": log.step,
        **values,
        "sparsity": masks_.sparsity(state.masks),
        **{f"sparsity/{path}": value for path, value in by_path.items()},
    }
    log.rows.append(row)
    return row


# ------------------------------------------------------------------- the checkpoints


def is_due(plan: Plan, log: Log) -> bool:
    """Whether to save: after each event but epochs in between."""
    row, stage = (log.rows[-1] if log.rows else None), next_stage(plan, log)
    if row is None or row["step"] != log.step:
        return False
    if row["event"] != "train" or log.step == plan.end:
        return True
    if stage is not None and stage.time <= log.step:
        return True  # A pruning step may take longer than a scheduler waits.
    return round(row["epoch"]) % plan.config.checkpoint_every_epochs == 0


def last_checkpoint(workdir: Path, manager: Any) -> str:
    """A sentence on where a run can be taken up again."""
    event = checkpoint.latest_event(manager)
    if event is None:
        return "There is no checkpoint yet"
    _, meta = checkpoint.restore(manager, event, {})
    folder = workdir / "checkpoints" / str(event)
    return f"The last checkpoint is {folder} ({Log(**meta['log']).moment})"


def save(plan: Plan, state: TrainState, log: Log, manager: Any) -> None:
    """Writes a checkpoint and waits for it."""
    # Within an epoch the network is not evaluated, and never the best.
    metrics = {"stage": -1, "top1": 0.0}
    if log.rows and log.rows[-1]["step"] == log.step:
        metrics = {"stage": len(log.stages), "top1": log.rows[-1]["top1"]}
    checkpoint.save(
        manager,
        log.event,
        state._asdict(),
        {"log": dataclasses.asdict(log), "config": config_.to_dict(plan.config)},
        metrics,
    )
