"""One pruning step of a run: its samples, options, memory plan, and its record."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.data import batches
from woodfisher_jax.info import PruneInfo, unwarned
from woodfisher_jax.masked import mask_state
from woodfisher_jax.prune import plan_pruning, prune
from woodfisher_jax.report import metrics
from woodfisher_jax.report.elements.quantities import counted
from woodfisher_jax.rows.gradients import sample_labels
from woodfisher_jax.rows.memory_plan import MemoryLimitError
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.selection.costs import MILLION
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.stages import matching
from woodfisher_jax.stages.damping_search import prune_searched
from woodfisher_jax.stages.matching import Rows, outputs_of
from woodfisher_jax.tracing.macs import sparse_macs
from woodfisher_jax.training import pruners
from woodfisher_jax.training.config import ConfigError, PruneConfig, step_options
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.network import loss_path
from woodfisher_jax.training.network.batch_norm import reestimate
from woodfisher_jax.training.network.objective import (
    frozen_errors,
    frozen_loss,
    frozen_outputs,
    linearized_loss,
    predict,
    structures_of,
    variables_of,
)
from woodfisher_jax.training.network.train_step import TrainState, copied
from woodfisher_jax.training.plan import Plan, Stage
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import Examples, regroup

logger = logging.getLogger(__name__)

REPORTED = (
    "saliency_histogram",
    "saliency_sum",
    "predicted_loss_increase",
    "gradient_term",
    "magnitude_overlap",
    "magnitude_correlation",
    "fisher_trace",
    "untouched",
    "empty_outputs",
    "revived",
    "warnings",
    "seconds_gradients",
    "seconds_curvature",
    "seconds_update",
)
"""Fields of a :class:`PruneInfo` that go into the results where they are known."""


def prune_state(
    plan: Plan, state: TrainState, stage: Stage, done: Sequence[Mapping[str, Any]]
) -> tuple[TrainState, dict[str, Any]]:
    """Prunes params, and the masks and optimizer state with them.

    Args:
        plan: The run.
        state: Before the step.
        stage: The step.
        done: Records of the pruning steps before it.

    Returns:
        The new state, and the record of the step.
    """
    pruner, draw = plan.config.pruners[stage.pruner], len(done)
    earlier = [record for record in done if record["pruner"] == stage.pruner]
    paths = pruners.selected_paths(state.params, pruner, plan.axes)
    if pruner.keeps_dense and not earlier:
        state = state._replace(dense=dense_copy(state))
    elif pruner.from_dense:
        state = _from_dense(state, paths)
    macs = _macs(plan, state.params, state.masks)
    goal = _goal(pruner, stage, earlier, macs)
    options = _options(plan, pruner, state)
    rows = _rows(plan, pruner, state, draw)
    step = prune
    held_out = _held_out(plan, pruner, draw)
    if held_out is not None:
        errors = frozen_errors(plan.model, state.batch_stats)
        step = functools.partial(
            prune_searched,
            held_out=held_out,
            measure=errors,
            damping=options["method"].damping,
        )
    with unwarned():  # they go into the log
        params, masks, info = step(
            rows.loss_fn,
            state.params,
            rows.samples,
            targets=rows.targets,
            mean_samples=_mean_samples(plan, pruner, draw),
            masks={path: state.masks[path] for path in paths},
            **goal,
            **options,
        )
    _log_findings(info)
    masks = {path: masks.get(path, mask) for path, mask in state.masks.items()}
    record = {
        "pruner": stage.pruner,
        "target_sparsity": goal.get("sparsity"),
        "target_macs": goal.get("flops_target"),
        "sparsity": info.sparsity,
        "macs_before": macs,
        "macs": _macs(plan, params, masks),
        **_losses(plan, pruner, state, params, draw),
        **{n: v for n in REPORTED if (v := getattr(info, n)) is not None},
        **_dampings(info),
        **metrics.needs_record(info.needs),
    }
    batch_stats = _batch_stats(plan, pruner, params, state.batch_stats, draw)
    opt_state = mask_state(state.opt_state, params, masks)
    state = TrainState(params, batch_stats, masks, opt_state, state.dense)
    return replicate(state, plan.mesh), record


def _log_findings(info: PruneInfo) -> None:
    """What a step was warned of, and weights and outputs of which nothing is known."""
    for text in info.warnings:
        logger.warning(text)
    for path, share in (info.untouched or {}).items():
        if 0 < share < 1:
            logger.info("%s: no gradient for %.2g %% of the weights", path, 100 * share)
    for path, number in (info.empty_outputs or {}).items():
        logger.info("%s: %s without a weight left", path, counted(number, "output"))
    if info.revived:
        logger.info("%d weights that were zero without a mask came back", info.revived)


def _macs(plan: Plan, params: Any, masks: Masks) -> float | None:
    return None if plan.costs is None else sparse_macs(plan.costs, params, masks)


def _dampings(info: PruneInfo) -> dict[str, Any]:
    """The dampings that a step has chosen or tried, with their errors."""
    found: dict[str, Any] = {}
    if info.trials is not None:
        found["damping_trials"] = [trial._asdict() for trial in info.trials]
        for trial in info.trials:
            logger.info(
                "damping %.3g: %.2f %% errors on held-out examples",
                trial.damping,
                100 * trial.measured,
            )
    for name, chosen in zip(
        ("damping_statistic", "damping_update"), info.dampings or (), strict=False
    ):
        found[name] = chosen._asdict()
        logger.info(
            "%s: %.3g, %.2g of the mean eigenvalue, leave-one-out error %.0f %%",
            name.replace("_", " for the "),
            chosen.damping,
            chosen.multiple,
            100 * chosen.error,
        )
    return found


def forecast(plan: Plan, variables: Any, masks: Masks) -> dict[str, Needs]:
    """The memory plan of a step of each pruner; without those that keep no gradients.

    Raises:
        MemoryLimitError: If one does not fit; the message says what would.
        ConfigError: If one cannot be run with this network.
    """
    state = TrainState(
        variables["params"], variables.get("batch_stats", {}), masks, None
    )
    found = {}
    for name, pruner in plan.config.pruners.items():
        paths = pruners.selected_paths(state.params, pruner, plan.axes)
        last = Stage(0, pruner.target_sparsity, name)
        try:
            needs = plan_pruning(
                _fisher_loss(plan, pruner, state.batch_stats),
                state.params,
                fisher_batch(plan, pruner, state, draw=0),
                mean_samples=_mean_samples(plan, pruner, draw=0),
                masks={path: masks[path] for path in paths},
                **_goal(pruner, last, (), None),
                **_options(plan, pruner, state),
            )
        except MemoryLimitError:
            raise
        except ValueError as error:
            raise ConfigError(f"config.{name}: {error}") from error
        if needs is not None:
            found[name] = needs
    return found


def _options(plan: Plan, pruner: PruneConfig, state: TrainState) -> dict[str, Any]:
    """Arguments of :func:`woodfisher_jax.prune` from the config, without the level."""
    method, goal, compute = step_options(plan.config, pruner)
    if isinstance(goal.pattern, Pattern) and goal.pattern.kinds:
        # A method without samples cannot find them itself.
        variables = variables_of(state.params, state.batch_stats)
        found = structures_of(plan.model, variables, plan.dataset.image_shape)
        goal = goal.replace(pattern=goal.pattern._replace(structures=found))
    shared = goal.replace(sparsity=None, flops_target=None).given()
    compute = compute.replace(mesh=plan.mesh, progress=plan.progress)
    diagnostics = pruner.diagnostics
    return {
        "method": method,
        "compute": compute,
        "diagnostics": diagnostics,
        "axes": plan.axes,
        **shared,
    }


# ------------------------------------------------------------------ how far, from where


def _goal(
    pruner: PruneConfig,
    stage: Stage,
    earlier: Sequence[Mapping[str, Any]],
    macs: float | None,
) -> dict[str, Any]:
    """The sparsity of a step, or where MACs are the target those on the way to it.

    ``f(t) = f_T + (f_0 - f_T) (1 - (t - t₀)/(t₁ - t₀))^degree``, with f_0 those of the
    network before the first step, or after the one to the initial sparsity.
    """
    target, first = pruner.target_sparsity, pruner.initial_sparsity
    last_macs = pruner.value_of("flops_target")
    left = 0.0 if target == first else (target - stage.sparsity) / (target - first)
    if last_macs is None or (left == 1 and first > 0):
        return {"sparsity": stage.sparsity}
    if left == 0:
        return {"flops_target": last_macs}
    start = macs
    if earlier:
        start = earlier[0]["macs" if first > 0 else "macs_before"]
    # Without MACs the forecast has refused the target already.
    assert start is not None
    return {"flops_target": last_macs + left * (start / MILLION - last_macs)}


def _from_dense(state: TrainState, paths: Sequence[str]) -> TrainState:
    """The state before the first step, but for what other pruners prune."""
    dense = copied(state.dense)
    leaves, masks = leaves_by_path(dense["params"]), dense["masks"]
    return state._replace(
        params=replace_leaves(state.params, {path: leaves[path] for path in paths}),
        batch_stats=dense["batch_stats"],
        masks=state.masks | {path: masks[path] for path in paths},
    )


def dense_copy(state: TrainState) -> dict[str, Any]:
    """What the steps of a repeated one-shot start from."""
    return copied(
        {
            "params": state.params,
            "batch_stats": state.batch_stats,
            "masks": state.masks,
        }
    )


# ----------------------------------------------------------------------------- samples


def fisher_batch(
    plan: Plan, pruner: PruneConfig, state: TrainState, draw: int, again: int = 0
) -> Any:
    """The examples of one Fisher, with labels of the data or of the model.

    One batch, or :class:`Examples` where they stay in files; None for methods that need
    no examples.

    Args:
        plan: The run.
        pruner: Whose Fisher.
        state: The network, for labels of the model.
        draw: Which pruning step of the run it is.
        again: Which recomputation within it.
    """
    count = pruner.num_examples
    method, goal, _ = step_options(plan.config, pruner)
    if not method.needs_samples:
        if not goal.counts_macs:
            return None
        count = 1  # Multiply-accumulates are those of an example.
    samples = _examples(plan, pruner, draw, count, again)
    if not pruner.true_fisher:
        return samples
    number = _number(pruner, draw, again)
    key = jax.random.fold_in(jax.random.key(plan.config.seed), number)
    variables = variables_of(state.params, state.batch_stats)
    if isinstance(samples, Examples):

        def read() -> Iterator[dict[str, np.ndarray]]:
            for place, batch in enumerate(samples):
                own = jax.random.fold_in(key, place)
                logits = predict(plan.model, variables, batch["image"])
                yield {**batch, "label": np.asarray(sample_labels(own, logits))}

        return Examples(samples.size, read)
    logits = [
        predict(plan.model, variables, samples["image"][i : i + 1000])
        for i in range(0, len(samples["label"]), 1000)
    ]
    drawn = sample_labels(key, jnp.concatenate(logits))
    return {**samples, "label": np.asarray(drawn)}


def _number(pruner: PruneConfig, draw: int, again: int) -> int:
    """Of a draw among all those of the run; always 0 for samples that stay the same."""
    each = pruner.value_of("recompute") + 1
    return draw * each + again if pruner.redraw_samples else 0


def _examples(
    plan: Plan, pruner: PruneConfig, draw: int, count: int, again: int = 0
) -> Any:
    """Training examples of a draw; fewer of them are the first of more."""
    return batches.fisher_samples(
        plan.dataset,
        seed=plan.config.seed,
        draw=_number(pruner, draw, again),
        count=count,
        augment=pruner.augment,
    )


def _rows(plan: Plan, pruner: PruneConfig, state: TrainState, draw: int) -> Rows:
    """The loss, samples and targets of a step's gradients."""
    if pruner.match == "none":
        loss_fn = _fisher_loss(plan, pruner, state.batch_stats)
        samples = functools.partial(fisher_batch, plan, pruner, state, draw)
        again = pruner.value_of("recompute") and pruner.redraw_samples
        return Rows(loss_fn, samples if again else samples(), None)
    count = pruner.num_examples
    batch = next(regroup(_examples(plan, pruner, draw, count), count))
    outputs_fn = frozen_outputs(plan.model, state.batch_stats)
    if pruner.match == "labels":
        stage = matching.Stage(outputs_fn, batch["image"], batch["label"])
        return matching.label_rows(stage, count // pruner.num_samples)
    dense = frozen_outputs(plan.model, state.dense["batch_stats"])
    outputs = outputs_of(dense, state.dense["params"], batch["image"])
    key = jax.random.fold_in(jax.random.key(plan.config.seed), draw)
    stage = matching.Stage(outputs_fn, batch["image"], outputs)
    return matching.matching_rows(stage, state.params, key, pruner.match_metric)


def _held_out(plan: Plan, pruner: PruneConfig, draw: int) -> Any:
    """Training examples to search the damping by, none of the Fisher's, or None."""
    count = pruner.damping_search_samples
    if not count or not step_options(plan.config, pruner).method.needs_samples:
        return None
    used = max(pruner.num_examples, pruner.mean_samples or 0)
    drawn = _examples(plan, pruner, draw, used + count)
    batch = next(regroup(drawn, used + count))
    return {name: array[used:] for name, array in batch.items()}


def _mean_samples(plan: Plan, pruner: PruneConfig, draw: int) -> Any:
    if pruner.mean_samples is None:
        return None
    return _examples(plan, pruner, draw, pruner.mean_samples)


def _fisher_loss(plan: Plan, pruner: PruneConfig, batch_stats: Any) -> Any:
    return frozen_loss(plan.model, batch_stats, pruner.label_smoothing)


# --------------------------------------------------------------------- after the step


def _losses(
    plan: Plan, pruner: PruneConfig, before: TrainState, params: Any, draw: int
) -> dict[str, Any]:
    """The loss before and after a step, with the batch-norm statistics of before."""
    count = pruner.loss_samples
    count = pruner.num_examples if count is None else count
    if count == 0:
        return {}
    loss_fn = _fisher_loss(plan, pruner, before.batch_stats)
    batch = _examples(plan, pruner, draw, count)
    chunk = plan.config.eval_batch_size
    record: dict[str, Any] = {
        "train_loss_before": loss_path.mean_loss(loss_fn, before.params, batch, chunk),
        "train_loss_after": loss_path.mean_loss(loss_fn, params, batch, chunk),
    }
    if pruner.diagnostics:
        linear = linearized_loss(
            plan.model, before.batch_stats, before.params, pruner.label_smoothing
        )
        step = jax.tree.map(jnp.subtract, params, before.params)
        found = loss_path.mean_loss(linear, step, batch, chunk)
        record["train_loss_predicted"] = found
    if pruner.loss_path_steps:

        def test_loss(params: Any) -> float:
            return evaluate(
                plan.model,
                params,
                before.batch_stats,
                plan.dataset,
                batch_size=chunk,
                mesh=plan.mesh,
            )["loss"]

        path = loss_path.follow(
            loss_fn,
            before.params,
            params,
            batch,
            num_steps=pruner.loss_path_steps,
            batch_size=min(pruner.value_of("batch_size"), count),
            chunk_size=chunk,
            test_loss=test_loss,
        )
        record["loss_path"] = path._asdict()
    return record


def _batch_stats(
    plan: Plan, pruner: PruneConfig, params: Any, batch_stats: Any, draw: int
) -> Any:
    """Batch-norm statistics after a step, estimated again if the config says so."""
    count = pruner.batch_norm_samples
    if not count:
        return batch_stats
    images = batches.batch_norm_batches(
        plan.dataset,
        seed=plan.config.seed,
        draw=draw,
        count=count,
        batch_size=plan.config.train.batch_size,
        augment=pruner.batch_norm_augment and plan.config.data.augment,
    )
    return reestimate(plan.model, params, batch_stats, images)
