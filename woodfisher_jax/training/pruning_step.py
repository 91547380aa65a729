"""One pruning step of a run: its samples, options and needs, and what it did."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.data import batches
from woodfisher_jax.info import PruneInfo
from woodfisher_jax.masked import mask_state
from woodfisher_jax.methods import METHODS
from woodfisher_jax.prune import plan_pruning, prune
from woodfisher_jax.report import metrics
from woodfisher_jax.rows.gradients import sample_labels
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.settings import AUTO
from woodfisher_jax.stages import matching
from woodfisher_jax.stages.damping_search import prune_searched
from woodfisher_jax.stages.matching import Rows, outputs_of
from woodfisher_jax.tracing import macs as flops
from woodfisher_jax.training import loss_path, pruners
from woodfisher_jax.training.batch_norm import reestimate
from woodfisher_jax.training.evaluate import evaluate
from woodfisher_jax.training.objective import (
    frozen_errors,
    frozen_loss,
    frozen_outputs,
    predict,
    variables_of,
)
from woodfisher_jax.training.plan import Plan, Stage
from woodfisher_jax.training.sections import PruneConfig
from woodfisher_jax.training.train_step import TrainState
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import Examples, regroup

logger = logging.getLogger(__name__)

PASSED = (
    "method",
    "scope",
    "pattern",
    "flops_power",
    "flops_per_parameter",
    "flops_normalize",
    "damping",
    "centered",
    "pi",
    "hessian",
    "num_probes",
    "num_samples",
    "batch_size",
    "microbatch_size",
    "block_size",
    "update",
    "scale_update",
    "normalize_update",
    "swaps",
    "recompute",
    "recompute_schedule",
    "recompute_degree",
    "solver",
    "store",
    "store_dtype",
    "store_dir",
    "diagnostics",
)
"""Fields that are arguments of :func:`woodfisher_jax.prune` by the same name."""

REPORTED = (
    "saliency_histogram",
    "saliency_sum",
    "predicted_loss_increase",
    "gradient_term",
    "magnitude_overlap",
    "magnitude_correlation",
    "fisher_trace",
)
"""What of a :class:`PruneInfo` goes into the results where it is known."""


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
        The new state, and a record of what was done.
    """
    pruner, draw = plan.config.pruners[stage.pruner], len(done)
    earlier = [record for record in done if record["pruner"] == stage.pruner]
    paths = pruners.selected_paths(state.params, pruner)
    if pruner.needs_dense and not earlier:
        state = state._replace(dense=dense_copy(state))
    elif pruner.from_dense:
        state = _from_dense(state, paths)
    macs = None
    if plan.costs is not None:
        macs = flops.sparse_macs(plan.costs, state.params, state.masks)
    goal = _goal(pruner, stage, earlier, macs)
    rows = _rows(plan, pruner, state, draw)
    held_out = _held_out(plan, pruner, draw)
    step = prune
    if held_out is not None:
        errors = frozen_errors(plan.model, state.batch_stats)
        step = functools.partial(prune_searched, held_out=held_out, measure=errors)
    params, masks, info = step(
        rows.loss_fn,
        state.params,
        rows.samples,
        targets=rows.targets,
        mean_samples=_mean_samples(plan, pruner, draw),
        masks={path: state.masks[path] for path in paths},
        progress=plan.progress,
        **goal,
        **options(plan, pruner),
    )
    masks = {path: masks.get(path, mask) for path, mask in state.masks.items()}
    record = {
        "pruner": stage.pruner,
        "target_sparsity": goal.get("sparsity"),
        "target_macs": goal.get("flops_target"),
        "sparsity": info.sparsity,
        "macs_before": macs,
        "macs": plan.costs and flops.sparse_macs(plan.costs, params, masks),
        **_losses(plan, pruner, state, params, draw),
        **{n: v for n in REPORTED if (v := getattr(info, n)) is not None},
        **_dampings(info),
        "seconds_gradients": info.seconds_gradients,
        "seconds_curvature": info.seconds_curvature,
        "seconds_update": info.seconds_update,
        **metrics.needs_record(info.needs),
    }
    batch_stats = _batch_stats(plan, pruner, params, state.batch_stats, draw)
    opt_state = mask_state(state.opt_state, params, masks)
    state = TrainState(params, batch_stats, masks, opt_state, state.dense)
    return replicate(state, plan.mesh), record


def _dampings(info: PruneInfo) -> dict[str, Any]:
    """The dampings that a step has chosen or tried, and how well they do."""
    found: dict[str, Any] = {}
    if info.trials is not None:
        found["damping_trials"] = [trial._asdict() for trial in info.trials]
        for trial in info.trials:
            logger.info(
                "damping %.3g: %.2f %% errors on examples kept apart",
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
    """What a step of each pruner needs; without those that keep no gradients.

    Raises:
        MemoryLimitError: If one does not fit; the message says what would.
    """
    state = TrainState(
        variables["params"], variables.get("batch_stats", {}), masks, None
    )
    found = {}
    for name, pruner in plan.config.pruners.items():
        paths = pruners.selected_paths(state.params, pruner)
        target = pruner.flops_target
        goal: dict[str, Any] = (
            {"flops_target": target} if target else {"sparsity": pruner.target_sparsity}
        )
        needs = plan_pruning(
            _fisher_loss(plan, pruner, state.batch_stats),
            state.params,
            fisher_batch(plan, pruner, state, draw=0),
            mean_samples=_mean_samples(plan, pruner, draw=0),
            masks={path: masks[path] for path in paths},
            **goal,
            **options(plan, pruner),
        )
        if needs is not None:
            found[name] = needs
    return found


def options(plan: Plan, pruner: PruneConfig) -> dict[str, Any]:
    """The options of :func:`woodfisher_jax.prune` that the config sets."""
    limit = pruner.memory_limit_gb
    decay = plan.config.train.weight_decay
    return {
        **{name: getattr(pruner, name) for name in PASSED},
        **({"damping": AUTO} if pruner.auto_damping else {}),
        "weight_decay": decay if pruner.damping_plus_weight_decay else 0.0,
        "probe_seed": plan.config.seed if pruner.hessian == "hutchinson" else 0,
        "memory_limit": None if limit is None else limit * 1e9,
        "mesh": plan.mesh,
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
    left = 0.0 if target == first else (target - stage.sparsity) / (target - first)
    if pruner.flops_target is None or (left == 1 and first > 0):
        return {"sparsity": stage.sparsity}
    if left == 0:
        return {"flops_target": pruner.flops_target}
    start = macs
    if earlier:
        start = earlier[0]["macs" if first > 0 else "macs_before"]
    # Without MACs the forecast has refused the target already.
    assert start is not None
    way = start / 1e6 - pruner.flops_target
    return {"flops_target": pruner.flops_target + left * way}


def _from_dense(state: TrainState, paths: Sequence[str]) -> TrainState:
    """The state before the first step; what other pruners prune stays as it is."""
    leaves, masks = leaves_by_path(state.dense["params"]), state.dense["masks"]
    return state._replace(
        params=replace_leaves(state.params, {path: leaves[path] for path in paths}),
        batch_stats=state.dense["batch_stats"],
        masks=state.masks | {path: masks[path] for path in paths},
    )


def dense_copy(state: TrainState) -> dict[str, Any]:
    """What the steps of a repeated one-shot start from."""
    return {
        "params": state.params,
        "batch_stats": state.batch_stats,
        "masks": state.masks,
    }


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
    count = pruner.num_samples * pruner.batch_size
    if METHODS[pruner.method].curvature is None:
        if not pruner.flops_power and pruner.flops_target is None:
            return None
        count = 1  # Multiply-accumulates are those of an example.
    number = _draw(pruner, draw, again)
    samples = _examples(plan, pruner, number, count)
    if not pruner.true_fisher:
        return samples
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


def _draw(pruner: PruneConfig, draw: int, again: int = 0) -> int:
    return draw * (pruner.recompute + 1) + again if pruner.redraw_samples else 0


def _examples(plan: Plan, pruner: PruneConfig, number: int, count: int) -> Any:
    return batches.fisher_samples(
        plan.dataset,
        seed=plan.config.seed,
        draw=number,
        count=count,
        augment=pruner.augment,
    )


def _fisher_source(
    plan: Plan, pruner: PruneConfig, state: TrainState, draw: int
) -> Any:
    """The samples, or where they are drawn anew in a step the function that does it."""
    if pruner.recompute and pruner.redraw_samples:
        return lambda again: fisher_batch(plan, pruner, state, draw, again)
    return fisher_batch(plan, pruner, state, draw)


def _rows(plan: Plan, pruner: PruneConfig, state: TrainState, draw: int) -> Rows:
    """What a step takes the gradients of, at which samples, and towards what."""
    if pruner.match == "none":
        loss_fn = _fisher_loss(plan, pruner, state.batch_stats)
        return Rows(loss_fn, _fisher_source(plan, pruner, state, draw), None)
    count = pruner.num_samples * pruner.batch_size
    batch = next(regroup(_examples(plan, pruner, _draw(pruner, draw), count), count))
    outputs_fn = frozen_outputs(plan.model, state.batch_stats)
    if pruner.match == "labels":
        stage = matching.Stage(outputs_fn, batch["image"], batch["label"])
        return matching.label_rows(stage, pruner.batch_size)
    dense = frozen_outputs(plan.model, state.dense["batch_stats"])
    wanted = outputs_of(dense, state.dense["params"], batch["image"])
    key = jax.random.fold_in(jax.random.key(plan.config.seed), draw)
    stage = matching.Stage(outputs_fn, batch["image"], wanted)
    return matching.matching_rows(stage, state.params, key, pruner.match_metric)


def _held_out(plan: Plan, pruner: PruneConfig, draw: int) -> Any:
    """Training examples that the damping is searched by and nothing else, or None."""
    count = pruner.damping_search_samples
    if not count or METHODS[pruner.method].curvature is None:
        return None
    used = max(pruner.num_samples * pruner.batch_size, pruner.mean_samples or 0)
    drawn = _examples(plan, pruner, _draw(pruner, draw), used + count)
    batch = next(regroup(drawn, used + count))
    return {name: array[used:] for name, array in batch.items()}


def _mean_samples(plan: Plan, pruner: PruneConfig, draw: int) -> Any:
    if pruner.mean_samples is None:
        return None
    return _examples(plan, pruner, _draw(pruner, draw), pruner.mean_samples)


def _fisher_loss(plan: Plan, pruner: PruneConfig, batch_stats: Any) -> Any:
    return frozen_loss(plan.model, batch_stats, pruner.label_smoothing)


# ------------------------------------------------------------------------- afterwards


def _losses(
    plan: Plan, pruner: PruneConfig, before: TrainState, params: Any, draw: int
) -> dict[str, Any]:
    """The loss before and after a step, on the batch-norm statistics of before."""
    size = pruner.batch_size
    count = pruner.loss_samples
    count = pruner.num_samples * size if count is None else count
    if count == 0:
        return {}
    loss_fn = _fisher_loss(plan, pruner, before.batch_stats)
    batch = _examples(plan, pruner, _draw(pruner, draw), count)
    chunk = plan.config.eval_batch_size
    record: dict[str, Any] = {
        "train_loss_before": loss_path.mean_loss(loss_fn, before.params, batch, chunk),
        "train_loss_after": loss_path.mean_loss(loss_fn, params, batch, chunk),
    }
    if pruner.loss_path_steps:
        path = loss_path.follow(
            loss_fn,
            before.params,
            params,
            batch,
            num_steps=pruner.loss_path_steps,
            batch_size=min(size, count),
            chunk_size=chunk,
            test_loss=_test_loss(plan, before.batch_stats),
        )
        record["loss_path"] = path._asdict()
    return record


def _test_loss(plan: Plan, batch_stats: Any) -> Callable[[Any], float]:
    size = plan.config.eval_batch_size
    return lambda params: evaluate(
        plan.model,
        params,
        batch_stats,
        plan.dataset,
        batch_size=size,
        mesh=plan.mesh,
    )["loss"]


def _batch_stats(
    plan: Plan, pruner: PruneConfig, params: Any, batch_stats: Any, draw: int
) -> Any:
    """Batch-norm statistics after a step: estimated anew where the config says so."""
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
