"""Pruning that keeps a network's outputs as they were, in stages, without labels.

Every stage is one damped Gauss-Newton step of

    minimize  E ‖f(w, x) - f(w₀, x)‖² / 2    subject to the sparsity of the stage

from where the last one ended: rows ``g_n = ∇_w (r_n · f(w, x_n))`` with random r, what
they are to change by, ``y_n = r_n · (f(w₀, x_n) - f(w, x_n))``, saliencies with that
slope, and the joint update, with the damping that the rows choose among themselves. The
curvature of the outputs does not vanish where a network fits its data, as that of the
loss does, and a step also repairs what the steps before it did.

With labels instead, the rows are gradients of the cross entropy, each of a few
examples, and the slope is that of the loss: each stage also trains.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from woodfisher_jax.info import PruneInfo
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.rows.projections import directions, projected
from woodfisher_jax.schedules import levels
from woodfisher_jax.trees.masks import Masks, Prunable, init_masks
from woodfisher_jax.trees.masks import sparsity as sparsity_of
from woodfisher_jax.trees.paths import Params

MATCHES = ("none", "outputs", "labels")
"""What a run's outputs are brought to: nothing, those of the dense network without
labels, or the labels."""

LABEL_DAMPING = 1e-2
"""λ of stages with labels: leave-one-out takes more, the best for a single step, but
noise averages out over many."""

OutputsFn = Callable[[Params, Any], jax.Array]


class Stage(NamedTuple):
    """What one stage is given.

    Attributes:
        outputs_fn: (params, inputs) -> outputs [n, k], with statistics as they are now.
        inputs: Examples, new ones at each stage.
        wanted: Outputs that they are to have [n, k], or their labels, integers [n].
    """

    outputs_fn: OutputsFn
    inputs: Any
    wanted: jax.Array | np.ndarray


class Rows(NamedTuple):
    """Arguments of :func:`woodfisher_jax.prune`.

    Attributes:
        loss_fn: Whose gradients the rows are.
        samples: Their examples.
        targets: y, by which the rows are to change, [N] or one number; None for no
            such thing.
        batch_size: m, examples a row.
    """

    loss_fn: LossFn
    samples: Any
    targets: jax.Array | float | None
    batch_size: int = 1


def outputs_of(
    outputs_fn: OutputsFn, params: Params, inputs: Any, batch_size: int = 250
) -> jax.Array:
    """Outputs of many examples, some at a time [n, k]."""
    count = len(jax.tree.leaves(inputs)[0])
    slices = [slice(i, i + batch_size) for i in range(0, count, batch_size)]
    parts = [jax.tree.map(lambda a, rows=rows: a[rows], inputs) for rows in slices]
    return jnp.concatenate([outputs_fn(params, part) for part in parts])


def matching_rows(
    stage: Stage, params: Params, key: jax.Array, metric: str = "identity"
) -> Rows:
    """Rows of random projections of the outputs, and what they are to change by.

    ``g_n = ∇_w (r_n · f(w, x_n))`` and ``y_n = r_n · (f* - f(w, x_n))``: the arguments
    of :func:`woodfisher_jax.prune` for one damped Gauss-Newton step towards f*.

    Args:
        stage: f, x and f*.
        params: w.
        key: A JAX random key.
        metric: Of the distance to f*, one of
            :data:`~woodfisher_jax.rows.projections.METRICS`; default "identity".
    """
    outputs = outputs_of(stage.outputs_fn, params, stage.inputs)
    wanted = jnp.asarray(stage.wanted)
    r = directions(key, wanted, metric)
    missing = jnp.sum(r * (wanted - outputs), axis=tuple(range(1, r.ndim)))
    samples = {"inputs": stage.inputs, "direction": np.asarray(r)}
    return Rows(projected(stage.outputs_fn), samples, missing)


def label_rows(stage: Stage, batch_size: int = 16) -> Rows:
    """Rows of the cross entropy of a few examples each, scaled to the Fisher of one.

    ``g_n = √m ∇_w (1/m) Σ_j CE(f(w, x_nj), label_nj)``: gradients at their noise have a
    second moment m times smaller in the mean of m, and √m makes up for it. The slope is
    that of the loss itself, ``ḡ = Σ_n g_n / (N √m)``.

    Args:
        stage: f, x and the labels.
        batch_size: m; default 16.
    """
    root = float(batch_size) ** 0.5
    samples = {"inputs": stage.inputs, "labels": np.asarray(stage.wanted)}
    loss = scaled_cross_entropy(stage.outputs_fn, root)
    return Rows(loss, samples, -1.0 / root, batch_size)


def scaled_cross_entropy(outputs_fn: OutputsFn, scale: float) -> LossFn:
    """``(params, batch) -> scale · mean CE(f(w, inputs), labels)``.

    Args:
        outputs_fn: f; for the same one, with other arrays in its ``Partial``, nothing
            is compiled anew.
        scale: Of the loss.
    """
    if isinstance(outputs_fn, Partial):
        loss = _scaled_cross_entropy(outputs_fn.func, scale)
        return Partial(loss, *outputs_fn.args, **outputs_fn.keywords)
    return _scaled_cross_entropy(outputs_fn, scale)


@functools.lru_cache(maxsize=8)
def _scaled_cross_entropy(outputs_fn: Callable[..., jax.Array], scale: float) -> LossFn:
    # Cached, since jit recognises a function it has compiled by its identity.
    def loss(*arguments: Any, **others: Any) -> jax.Array:
        *first, batch = arguments
        outputs = outputs_fn(*first, batch["inputs"], **others)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return scale * jnp.mean(entropy(outputs, batch["labels"]))

    return loss


def prune_matched(
    stage: Callable[[int, Params], Stage],
    params: Params,
    *,
    sparsity: float | Sequence[float],
    stages: int = 12,
    repairs: int = 0,
    masks: Masks | None = None,
    prunable: Prunable = None,
    metric: str = "identity",
    batch_size: int = 16,
    seed: int = 0,
    after: Callable[[int, Params, Masks, PruneInfo], Params | None] | None = None,
    **options: Any,
) -> tuple[Params, Masks, list[PruneInfo]]:
    """Prunes a network in stages and keeps its outputs near those that are wanted.

    Args:
        stage: (number from 0, parameters) -> :class:`Stage`: draws examples anew,
            estimates batch-norm statistics anew, and so on. In the simplest case
            ``lambda i, params: Stage(net, images(i), net(dense, images(i)))``.
        params: Any pytree of floating-point arrays: w₀.
        sparsity: Of all prunable weights at the end, [0, 1), or at each stage.
        stages: On the way to one sparsity, each of which leaves the same share of what
            is left; default 12.
        repairs: Stages that follow and prune nothing; default 0.
        masks: What is pruned already; default nothing.
        prunable: As for :func:`woodfisher_jax.prune`, if no masks are given.
        metric: Of the distance of the outputs: "identity", or "softmax" for that in
            which the cross entropy is curved; default "identity".
        batch_size: Examples a row where labels are wanted; default 16.
        seed: Of the random directions.
        after: Called at the end of each stage with its number and what it left; if it
            returns parameters, trained on perhaps, the next stage starts from them.
        **options: Of :func:`woodfisher_jax.prune`; unless given method="woodtaylor",
            update="joint", damping="auto", with labels :data:`LABEL_DAMPING`.

    Returns:
        ``(params, masks, infos)``, the info of each stage.

    Raises:
        ValueError: If stages or repairs are no whole number, or as for
            :func:`woodfisher_jax.prune`.

    Example:
        >>> def net(params, x):
        ...     return x @ params["w"]
        >>> dense = {"w": jnp.array([[3.0, 0.1], [0.2, 2.0]])}
        >>> x = jax.random.normal(jax.random.key(0), (20, 2))
        >>> def stage(i, params):
        ...     return wf.matching.Stage(net, x, net(dense, x))
        >>> params, masks, infos = wf.prune_matched(
        ...     stage, dense, sparsity=0.5, stages=2
        ... )
        >>> masks["w"].tolist(), len(infos)
        ([[True, False], [False, True]], 2)
    """
    masks = init_masks(params, prunable) if masks is None else masks
    way = _way(sparsity_of(masks), sparsity, stages, repairs)
    key, infos = jax.random.key(seed), []
    for number, level in enumerate(way):
        found = stage(number, params)
        if np.issubdtype(found.wanted.dtype, np.integer):
            rows = label_rows(found, batch_size)
            damping: float | str = LABEL_DAMPING
        else:
            again = jax.random.fold_in(key, number)
            rows, damping = matching_rows(found, params, again, metric), "auto"
        given = {"method": "woodtaylor", "update": "joint", "damping": damping}
        params, masks, info = prune(
            rows.loss_fn,
            params,
            rows.samples,
            targets=rows.targets,
            batch_size=rows.batch_size,
            sparsity=level,
            masks=masks,
            **{**given, **options},
        )
        infos.append(info)
        if after is not None:
            changed = after(number, params, masks, info)
            params = params if changed is None else changed
    return params, masks, infos


def _way(
    start: float, goal: float | Sequence[float], stages: int, repairs: int
) -> list[float]:
    """The sparsity of every stage."""
    for name, number, least in (("stages", stages, 1), ("repairs", repairs, 0)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name}={number!r}; expected a whole number from {least}")
    if isinstance(goal, (int, float)):
        way = levels(start, goal, stages - 1, None)
    else:
        way = [float(level) for level in goal]
    if not way:
        raise ValueError("sparsity is an empty list; expected one for each stage")
    return [*way, *([way[-1]] * repairs)]
