"""Masks in the state of an Optax optimizer keep pruned weights at zero during training.

    tx = wf.masked(tx, wf.init_masks(params))
    levels = dict(wf.gradual(start=0, end=500, frequency=100, initial=0.3, target=0.9))
    for step, batch in enumerate(batches):
        if step in levels:
            params, opt_state, info = wf.prune_masked(
                loss_fn, params, opt_state, samples, sparsity=levels[step]
            )
        params, opt_state = train_step(params, opt_state, batch)  # unchanged

The optimizer's state is the only place that holds the masks, so they cannot be out of
date, and new masks do not compile the step again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.info import PruneInfo
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.trees.masks import Masks, apply_masks, check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves


class MaskedState(NamedTuple):
    """State of :func:`masked`.

    Attributes:
        inner_state: State of the wrapped optimizer; zero for pruned weights.
        masks: From path to bool, True = kept.
    """

    inner_state: Any
    masks: Masks


def masked(
    tx: optax.GradientTransformation, masks: Mapping[str, jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned weights, their gradients and their optimizer state at zero.

    For a pruned weight w the optimizer receives a zero gradient and a zero state, and
    its update is replaced by -w. A masked weight that is not zero (in restored
    parameters, for example) is therefore zero after the step.

    Args:
        tx: Any optimizer, ``optax.MultiSteps`` included. Wrap the whole of it: a
            transformation that is chained after ``masked`` changes pruned weights.
        masks: The initial masks, from path to bool, as :func:`init_masks` or
            :func:`prune` returns them. :func:`prune_masked` or :func:`with_masks`
            replaces them.

    Returns:
        An optimizer whose state is a :class:`MaskedState`. Its masks are copies, so
        that the state may be donated to a compiled step; each has the sharding of its
        weight.

    Raises:
        ValueError: At ``init``, if a mask does not fit the parameters.
        TypeError: At ``init``, if a mask is not boolean.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> tx = wf.masked(optax.sgd(0.5), {"w": jnp.array([True, False])})
        >>> opt_state = tx.init(params)
        >>> updates, opt_state = tx.update({"w": jnp.ones(2)}, opt_state, params)
        >>> optax.apply_updates(params, updates)["w"].tolist()
        [0.5, 0.0]
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> MaskedState:
        leaves = leaves_by_path(params)
        # optax.tree_map_params initialises with a tree that has no leaves.
        if not leaves:
            return MaskedState(inner.init(params), dict(masks))
        check_masks(params, masks)
        placed = {path: _placed_as(mask, leaves[path]) for path, mask in masks.items()}
        state = inner.init(apply_masks(params, placed))
        return MaskedState(mask_state(state, params, placed), placed)

    def update(
        updates: Params, state: MaskedState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, MaskedState]:
        masks = state.masks
        updates = apply_masks(updates, masks)
        kept = None if params is None else apply_masks(params, masks)
        changes, after = inner.update(updates, state.inner_state, kept, **extra)
        changes = apply_masks(changes, masks)
        if params is not None:
            changes = _without_pruned(changes, params, masks)
        # Some optimizers add a constant to their state.
        return changes, MaskedState(mask_state(after, updates, masks), masks)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_state(state: Any, params: Params, masks: Mapping[str, jax.Array]) -> Any:
    """Sets the optimizer state of pruned weights to zero.

    An array of the state belongs to a parameter if its path ends with the parameter's
    path and it has the parameter's shape: momentum, means of gradients and of their
    squares. A scalar for a whole tensor is left unchanged.

    Args:
        state: The state of any optimizer of Optax.
        params: The parameters, or any pytree with their structure and shapes.
        masks: From path to bool.
    """
    leaves = leaves_by_path(params)
    by_length = sorted(leaves, key=len, reverse=True)
    cleared = {}
    for path, value in leaves_by_path(state).items():
        owner = next((name for name in by_length if _ends_in(path, name)), None)
        if owner is None or owner not in masks:
            continue
        if jnp.shape(value) == jnp.shape(leaves[owner]):
            zero = jnp.zeros((), jnp.result_type(value))
            cleared[path] = jnp.where(masks[owner], value, zero)
    return replace_leaves(state, cleared)


def masks_of(opt_state: Any) -> Masks:
    """The masks in an optimizer's state.

    Args:
        opt_state: State of :func:`masked`, at any depth inside other transformations.

    Raises:
        ValueError: If the state has no masks, or has several.

    Example:
        >>> tx = wf.masked(optax.adam(0.1), {"w": jnp.array([True, False])})
        >>> wf.masks_of(tx.init({"w": jnp.ones(2)}))["w"].tolist()
        [True, False]
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_has_masks) if _has_masks(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state: expected the state of one wf.masked(tx, masks), found "
            f"{len(found)}; wrap the whole optimizer, once, before tx.init(params)"
        )
    return dict(found[0].masks)


def with_masks(
    params: Params, opt_state: Any, masks: Mapping[str, jax.Array]
) -> tuple[Params, Any]:
    """Replaces the masks and applies them to parameters and optimizer state.

    Args:
        params: Any pytree.
        opt_state: State of :func:`masked`.
        masks: From path to bool, with the paths of the masks in the state.

    Returns:
        ``(params, opt_state)``, zero for pruned weights.

    Raises:
        ValueError: If the state has no masks, or the new masks have other paths.
        TypeError: If a mask is not boolean.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> tx = wf.masked(optax.adam(0.1), {"w": jnp.ones(2, bool)})
        >>> opt_state = tx.init(params)
        >>> masks = {"w": jnp.array([False, True])}
        >>> params, opt_state = wf.with_masks(params, opt_state, masks)
        >>> params["w"].tolist(), wf.masks_of(opt_state)["w"].tolist()
        ([0.0, 2.0], [False, True])
    """
    old = masks_of(opt_state)
    check_masks(params, masks)
    if old.keys() != masks.keys():
        raise ValueError(
            f"masks: expected those of {sorted(old)}, as in the optimizer's state, got "
            f"{sorted(masks)}"
        )
    placed = {path: _placed_as(masks[path], old[path]) for path in old}
    opt_state = jax.tree.map(
        lambda state: state._replace(masks=placed) if _has_masks(state) else state,
        opt_state,
        is_leaf=_has_masks,
    )
    return apply_masks(params, placed), mask_state(opt_state, params, placed)


def prune_masked(
    loss_fn: LossFn | None,
    params: Params,
    opt_state: Any,
    samples: Any = None,
    **options: Any,
) -> tuple[Params, Any, PruneInfo]:
    """:func:`prune` for a training loop whose optimizer is :func:`masked`.

    Args:
        loss_fn: As for :func:`prune`.
        params: As for :func:`prune`.
        opt_state: The optimizer's state, with the present masks.
        samples: As for :func:`prune`.
        **options: As for :func:`prune`, except ``masks`` and ``prunable``.

    Returns:
        ``(params, opt_state, info)``, with the sharding of the arguments.

    Raises:
        ValueError: If the state has no masks, or as for :func:`prune`.

    Example:
        >>> params = {"w": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
        >>> opt_state = wf.masked(optax.adam(0.1), wf.init_masks(params)).init(params)
        >>> params, opt_state, info = wf.prune_masked(
        ...     None, params, opt_state, sparsity=0.5, method="globalmagni"
        ... )
        >>> params["w"].tolist(), info.nonzero
        ([[3.0, 0.0], [0.0, 2.0]], 2)
    """
    if given := options.keys() & {"masks", "prunable"}:
        raise ValueError(
            f"{given.pop()}: the masks are those in opt_state; leave the argument out"
        )
    pruned, masks, info = prune(
        loss_fn, params, samples, masks=masks_of(opt_state), **options
    )
    pruned = jax.tree.map(_placed_as, pruned, params)
    return *with_masks(pruned, opt_state, masks), info


def _without_pruned(
    updates: Params, params: Params, masks: Mapping[str, jax.Array]
) -> Params:
    """Updates that set pruned weights to exactly zero."""
    changes, weights = leaves_by_path(updates), leaves_by_path(params)
    # 0 - w, because -w turns a zero into a negative zero.
    return replace_leaves(
        updates,
        {
            path: jnp.where(mask, changes[path], 0 - weights[path])
            for path, mask in masks.items()
        },
    )


def _has_masks(state: Any) -> bool:
    return isinstance(state, MaskedState)


def _ends_in(path: str, name: str) -> bool:
    """Whether a path ends with the name; a bare array has the name ""."""
    return not name or path == name or path.endswith("/" + name)


def _placed_as(array: Any, other: Any) -> jax.Array:
    """A copy of an array with the sharding of another; while tracing, a plain copy."""
    copy = jnp.array(array, copy=True)
    if isinstance(other, jax.core.Tracer) or not isinstance(other, jax.Array):
        return copy
    # An array that is committed to a device may move others or compile again.
    moves = copy.sharding != other.sharding
    return jax.device_put(copy, other.sharding) if moves else copy
