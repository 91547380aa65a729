"""One pruning step of a run: its Fisher samples, its options, what it needs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax import optimizer
from woodfisher_jax.data import batches
from woodfisher_jax.objective import frozen_loss, predict, variables_of
from woodfisher_jax.plan import Plan
from woodfisher_jax.pruning import prune as prune_
from woodfisher_jax.pruning.gradients import sample_labels
from woodfisher_jax.pruning.masks import Masks
from woodfisher_jax.pruning.methods import METHODS
from woodfisher_jax.pruning.prune import PruneInfo
from woodfisher_jax.pruning.resources import Needs
from woodfisher_jax.train_step import TrainState


def prune_state(
    plan: Plan, state: TrainState, sparsity: float, draw: int
) -> tuple[TrainState, PruneInfo]:
    """Prunes params, and the masks and optimizer state with them."""
    params, masks, info = prune_.prune(
        frozen_loss(plan.model, state.batch_stats),
        state.params,
        fisher_batch(plan, state, draw),
        sparsity=sparsity,
        masks=state.masks,
        progress=plan.progress,
        **options(plan),
    )
    if len(jax.local_devices()) > 1:
        # Pruning is spread over devices; training is not.
        params, masks = jax.tree.map(jnp.asarray, jax.device_get((params, masks)))
    opt_state = optimizer.mask_state(plan.train.tx, state.opt_state, params, masks)
    return TrainState(params, state.batch_stats, masks, opt_state), info


def forecast(plan: Plan, variables: Any, masks: Masks) -> Needs | None:
    """What a pruning step of the run needs; None for methods without gradients.

    Raises:
        MemoryLimitError: If it does not fit; the message says what would.
    """
    state = TrainState(
        variables["params"], variables.get("batch_stats", {}), masks, None
    )
    return prune_.plan_pruning(
        frozen_loss(plan.model, state.batch_stats),
        state.params,
        fisher_batch(plan, state, draw=0),
        sparsity=plan.config.prune.target_sparsity,
        masks=masks,
        **options(plan),
    )


def options(plan: Plan) -> dict[str, Any]:
    """The options of :func:`woodfisher_jax.prune` that the config sets."""
    settings = plan.config.prune
    limit, devices = settings.memory_limit_gb, jax.local_devices()
    return {
        "method": settings.method,
        "scope": settings.scope,
        "damping": settings.damping,
        "num_samples": settings.num_samples,
        "batch_size": settings.batch_size,
        "microbatch_size": settings.microbatch_size,
        "block_size": settings.block_size,
        "scale_update": settings.scale_update,
        "solver": settings.solver,
        "store": settings.store,
        "store_dtype": settings.store_dtype,
        "store_dir": settings.store_dir,
        "memory_limit": None if limit is None else limit * 1e9,
        "mesh": Mesh(np.asarray(devices), ("devices",)) if len(devices) > 1 else None,
    }


def fisher_batch(
    plan: Plan, state: TrainState, draw: int
) -> dict[str, np.ndarray] | None:
    """The examples of one Fisher, with labels of the data or of the model.

    None for methods without a curvature.
    """
    settings, seed = plan.config.prune, plan.config.seed
    if METHODS[settings.method].curvature is None:
        return None
    batch = batches.fisher_samples(
        plan.dataset,
        seed=seed,
        draw=draw,
        count=settings.num_samples * settings.batch_size,
        augment=settings.augment,
    )
    if settings.true_fisher:
        variables = variables_of(state.params, state.batch_stats)
        logits = [
            predict(plan.model, variables, batch["image"][i : i + 1000])
            for i in range(0, len(batch["label"]), 1000)
        ]
        key = jax.random.fold_in(jax.random.key(seed), draw)
        drawn = sample_labels(key, jnp.concatenate(logits))
        batch = {**batch, "label": np.asarray(drawn)}
    return batch
