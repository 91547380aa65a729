"""Diagonal of the Hessian of the mean loss, over the weights that masks keep.

Both estimators need nothing but products of the Hessian with vectors, each the forward
derivative of a gradient. Exact: one product a weight. Hutchinson: a few products with
random signs, for networks where that is hopeless.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.needs import Passes
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.targets import compiled
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.masks import Masks, apply_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import Batch, batch_length, regroup, shapes_of

Diagonal = dict[str, jax.Array]


def exact_diagonal(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    *,
    num_samples: int,
    microbatch_size: int = 64,
    probes_at_once: int = 32,
) -> Diagonal:
    """Diagonal of the Hessian: ``H_qq = e_qᵀ ∇²L e_q`` for each weight that is kept.

    L is the mean loss over ``num_samples`` examples. Each entry costs a forward and a
    backward pass over them, so this is for small networks.

    The curvature of Optimal Brain Damage (LeCun et al., 1989), not approximated.

    Note: the original differentiates each entry of the gradient backwards, over one
    graph of all samples, and takes pruned weights along.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree.
        masks: From path to bool; pruned weights are zero and get no entry.
        samples: One batch, or an iterable of batches, read in order.
        num_samples: Examples in the mean.
        microbatch_size: Most examples evaluated at once; it bounds memory.
        probes_at_once: Entries computed at once; memory and speed.

    Returns:
        From the path of each mask to the diagonal, of its shape, float32 (float64 for
        float64 weights); 0 where a weight is pruned. Entries may be negative.

    Raises:
        ValueError: If there are too few examples, or a loss or an entry is not finite.
    """
    loss_fn, order = as_partial(loss_fn), blocks.flat_order(masks)
    kept = np.flatnonzero(np.asarray(blocks.flatten(order, masks)))
    diagonal = np.zeros(order.size)
    width = max(1, min(probes_at_once, len(kept)))
    for batch, share in _microbatches(samples, num_samples, microbatch_size):
        _check_loss(loss_fn, params, masks, batch)
        for start in range(0, len(kept), width):
            chosen = kept[start : start + width]
            # The last few are filled up by repetition, to compile only once.
            entries = _entries(
                loss_fn, params, masks, batch, np.resize(chosen, width), order
            )
            diagonal[chosen] += share * np.asarray(entries)[: len(chosen)]
    return _by_path(diagonal, params, order)


def hutchinson_diagonal(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    *,
    num_samples: int,
    microbatch_size: int = 64,
    probes_at_once: int = 4,
    num_probes: int = 64,
    seed: int = 0,
) -> Diagonal:
    """Unbiased estimate of the Hessian's diagonal from products with random signs.

    ``diag(H) ≈ (1/P) Σ_p z_p ⊙ H z_p``, with the entries of z -1 or 1, and 0 where a
    weight is pruned. The variance of entry q is ``Σ_{r≠q} H_qr² / P``.

    Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree.
        masks: From path to bool; pruned weights are zero and get no entry.
        samples: One batch, or an iterable of batches, read in order.
        num_samples: Examples in the mean.
        microbatch_size: Most examples evaluated at once; it bounds memory.
        probes_at_once: Products computed at once; it does not change the result beyond
            rounding.
        num_probes: P.
        seed: Of the signs.

    Returns:
        As :func:`exact_diagonal`.

    Raises:
        ValueError: If there are too few examples, ``num_probes`` is not positive, or a
            loss or an entry is not finite.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes}; expected 1 or more")
    loss_fn, order = as_partial(loss_fn), blocks.flat_order(masks)
    diagonal = np.zeros(order.size)
    width = max(1, min(probes_at_once, num_probes))
    key = jax.random.key(seed)
    for batch, share in _microbatches(samples, num_samples, microbatch_size):
        _check_loss(loss_fn, params, masks, batch)
        for start in range(0, num_probes, width):
            probes = np.arange(start, start + width)
            total = _probed(
                loss_fn, params, masks, batch, key, probes, probes < num_probes, order
            )
            diagonal += share / num_probes * np.asarray(total)
    return _by_path(diagonal, params, order)


ESTIMATORS: dict[str, Callable[..., Diagonal]] = {
    "exact": exact_diagonal,
    "hutchinson": hutchinson_diagonal,
}
"""The estimators by name."""

PROBES_AT_ONCE = {"exact": 32, "hutchinson": 4}
"""Of each estimator, by default."""


def passes(
    problem: Problem, microbatch_size: int, estimator: str, num_probes: int
) -> Passes:
    """What an estimator takes; compiles what it then uses.

    Args:
        problem: The loss, its parameters and samples.
        microbatch_size: Most examples evaluated at once.
        estimator: A key of ESTIMATORS.
        num_probes: P, of "hutchinson".
    """
    loss_fn, params, masks = problem.loss_fn, problem.params, problem.masks
    num_samples = problem.num_samples * problem.batch_size
    example = next(regroup(problem.samples, 1))
    order = blocks.flat_order(masks)
    parts = -(-num_samples // microbatch_size)
    size = -(-num_samples // parts)
    batch = shapes_of(example, size)
    kept = int(np.sum(np.asarray(blocks.flatten(order, masks))))
    total = max(1, kept if estimator == "exact" else num_probes)
    width = min(PROBES_AT_ONCE[estimator], total)
    chosen = jax.ShapeDtypeStruct((width,), jnp.int32)
    if estimator == "exact":
        lowered = _entries.lower(loss_fn, params, masks, batch, chosen, order)
    else:
        real = jax.ShapeDtypeStruct((width,), jnp.bool_)
        key = jax.random.key(0)
        lowered = _probed.lower(loss_fn, params, masks, batch, key, chosen, real, order)
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    found = compiled(lowered, problem.compute.mesh).memory_analysis()
    return Passes(
        (found.temp_size_in_bytes if found else 0) + 8 * order.size,
        flops * parts * -(-total // width),
    )


def _microbatches(
    samples: Any, num_samples: int, microbatch_size: int
) -> Iterator[tuple[Batch, float]]:
    """The first examples in parts of one length, with their share in the mean."""
    size = -(-num_samples // -(-num_samples // microbatch_size))
    done = 0
    for batch in regroup(samples, size):
        wanted = min(batch_length(batch), num_samples - done)
        yield jax.tree.map(lambda a, n=wanted: a[:n], batch), wanted / num_samples
        done += wanted
        if done == num_samples:
            return
    raise ValueError(
        f"samples hold {done} examples, but num_samples={num_samples} are needed; give "
        "more examples or lower it"
    )


@jax.jit
def _loss(loss_fn: Partial, params: Params, masks: Masks, batch: Batch) -> jax.Array:
    return loss_fn(apply_masks(params, masks), batch)


def _check_loss(loss_fn: Partial, params: Params, masks: Masks, batch: Batch) -> None:
    """Raises unless the loss is finite: its derivatives may be though it is not.

    Raises:
        ValueError: With the first example of the batch whose own loss is not.
    """
    value = float(_loss(loss_fn, params, masks, batch))
    if math.isfinite(value):
        return
    where = "some of the samples"
    for i in range(batch_length(batch)):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], batch)
        if not math.isfinite(alone := float(_loss(loss_fn, params, masks, one))):
            shown = ", ".join(str(a) for a in jax.tree.leaves(one) if a.size == 1)
            value, where = alone, f"example {i} of a batch of {batch_length(batch)}"
            where += f" ({shown})" if shown else ""
            break
    raise ValueError(
        f"loss_fn returned {value} at {where}; it must be finite at the given params"
    )


def _gradient(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    batch: Batch,
    order: blocks.FlatOrder,
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """The gradient as a function of the flat prunable weights [d], and these."""
    params = apply_masks(params, masks)
    leaves = leaves_by_path(params)
    wide = {
        path: leaves[path].astype(jnp.promote_types(leaves[path].dtype, jnp.float32))
        for path in order.paths
    }

    def loss(weights: jax.Array) -> jax.Array:
        tensors = {
            path: tensor.astype(leaves[path].dtype)
            for path, tensor in blocks.unflatten(order, weights).items()
        }
        return loss_fn(replace_leaves(params, tensors), batch)

    return jax.grad(loss), blocks.flatten(order, wide)


@partial(jax.jit, static_argnames="order")
def _entries(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    batch: Batch,
    chosen: jax.Array,
    order: blocks.FlatOrder,
) -> jax.Array:
    """H_qq of one batch for each of some weights q."""
    gradient, weights = _gradient(loss_fn, params, masks, batch, order)

    def entry(index: jax.Array) -> jax.Array:
        unit = jnp.zeros_like(weights).at[index].set(1.0)
        _, column = jax.jvp(gradient, (weights,), (unit,))
        return column[index]

    return jax.vmap(entry)(chosen)


@partial(jax.jit, static_argnames="order")
def _probed(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    batch: Batch,
    key: jax.Array,
    probes: jax.Array,
    real: jax.Array,
    order: blocks.FlatOrder,
) -> jax.Array:
    """Sum of z ⊙ H z over some probes, each known by its number."""
    gradient, weights = _gradient(loss_fn, params, masks, batch, order)
    kept = blocks.flatten(order, masks)

    def product(probe: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(
            jax.random.fold_in(key, probe), weights.shape, weights.dtype
        )
        signs = jnp.where(kept, signs, 0.0)
        _, curved = jax.jvp(gradient, (weights,), (signs,))
        return signs * curved

    return jnp.sum(jnp.where(real[:, None], jax.vmap(product)(probes), 0.0), axis=0)


def _by_path(diagonal: np.ndarray, params: Params, order: blocks.FlatOrder) -> Diagonal:
    leaves = leaves_by_path(params)
    found = blocks.unflatten(order, jnp.asarray(diagonal))
    for path, tensor in found.items():
        if not np.isfinite(np.asarray(tensor)).all():
            raise ValueError(
                f"the Hessian's diagonal of {path!r} is not finite; look for a square "
                "root or a division at zero in loss_fn"
            )
    return {
        path: tensor.astype(jnp.promote_types(leaves[path].dtype, jnp.float32))
        for path, tensor in found.items()
    }
