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
import numpy as np
import optax

from woodfisher_jax.info import PruneInfo
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.trees.masks import (
    Masks,
    MasksLike,
    apply_masks,
    by_path,
    check_masks,
    paired,
)
from woodfisher_jax.trees.paths import (
    Params,
    leaves_by_path,
    replace_leaves,
    weight_name,
)


class MaskedState(NamedTuple):
    """State of :func:`masked`.

    Attributes:
        inner_state: State of the wrapped optimizer; zero for pruned weights.
        masks: From path to bool, True = kept.
    """

    inner_state: Any
    masks: Masks


def masked(
    tx: optax.GradientTransformation, masks: MasksLike
) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned weights, their gradients and their optimizer state at zero.

    For a pruned weight w the optimizer receives a zero gradient and a zero state, and
    its update is replaced by -w. A masked weight that is not zero (in restored
    parameters, for example) is therefore zero after the step.

    Args:
        tx: Any optimizer, ``optax.MultiSteps`` included. Wrap the whole of it: a
            transformation that is chained after ``masked`` changes pruned weights.
        masks: The initial masks, from path to bool, as :func:`init_masks` or
            :func:`prune` returns them, or a pytree of the parameters' structure.
            :func:`prune_masked` or :func:`with_masks` replaces them.

    Returns:
        An optimizer whose state is a :class:`MaskedState`. Its masks are copies, so
        that the state may be donated to a compiled step; each has the sharding of its
        weight.

    Raises:
        ValueError: At ``init``, if a mask does not fit the parameters, or the state of
            ``tx`` mixes weights in a way that their share in it cannot be cleared.
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
            return MaskedState(inner.init(params), by_path(masks))
        found = check_masks(params, masks)
        placed = {path: _placed_as(mask, leaves[path]) for path, mask in found.items()}
        _check_separable(inner, params, placed)
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


def mask_state(state: Any, params: Params, masks: MasksLike) -> Any:
    """Sets the optimizer state of pruned weights to zero.

    An array of the state belongs to a parameter if its path ends with the parameter's
    path and it has the parameter's shape, perhaps after an axis of past steps:
    momentum, means of gradients and of their squares. An array that has one entry for
    each weight of the network (``optax.flatten``) belongs to all parameters. Sums over
    weights, such as a scalar for a tensor or factors of its rows and columns, are left
    unchanged: they do not move a pruned weight.

    Args:
        state: The state of any optimizer of Optax.
        params: The parameters, or any pytree with their structure and shapes.
        masks: From path to bool, or a pytree of the parameters' structure.
    """
    leaves, masks = leaves_by_path(params), paired(params, masks)
    size = sum(map(jnp.size, leaves.values()))
    cleared = {}
    for path, value in leaves_by_path(state).items():
        owner, shape = _owner(path, leaves), jnp.shape(value)
        if owner is not None and _is_of(shape, jnp.shape(leaves[owner])):
            mask = masks.get(owner)
        elif owner is None and shape == (size,):
            mask = _joined(leaves, masks)
        else:
            continue
        if mask is not None:
            zero = jnp.zeros((), jnp.result_type(value))
            cleared[path] = jnp.where(mask, value, zero)
    return replace_leaves(state, cleared)


def _owner(path: str, leaves: Mapping[str, Any]) -> str | None:
    """The parameter whose path an array of the state ends with."""
    name = weight_name(path)
    owners = [leaf for leaf in leaves if _ends_in(name, weight_name(leaf))]
    return max(owners, key=len, default=None)


def _is_of(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a shape is the parameter's, or that with an axis of past steps before."""
    return shape == parameter or (bool(parameter) and shape[1:] == parameter)


def _joined(leaves: Mapping[str, Any], masks: Masks) -> jax.Array:
    """The mask of all weights in the order of the tree [size]."""
    flat = [
        jnp.ravel(masks[path]) if path in masks else np.ones(jnp.size(leaf), bool)
        for path, leaf in leaves.items()
    ]
    return jnp.concatenate(flat)


def _check_separable(
    tx: optax.GradientTransformation, params: Params, masks: Masks
) -> None:
    """Raises where :func:`mask_state` would leave moments, or cut what is no moment.

    Names and shapes alone do not say: a square preconditioner has the shape of its
    square tensor, and a vector may be several tensors in one. So the state of larger
    parameters is looked at, in which a moment grows as its parameter does.

    Raises:
        ValueError: With the path of the array, and what to do.
    """
    leaves = leaves_by_path(params)
    larger = {
        path: jax.ShapeDtypeStruct(_grown(leaf.shape), leaf.dtype)
        for path, leaf in leaves.items()
        if path in masks
    }
    before = leaves_by_path(jax.eval_shape(tx.init, params))
    try:
        state = jax.eval_shape(tx.init, replace_leaves(params, larger))
        after = leaves_by_path(state)
    except (TypeError, ValueError):
        return  # An optimizer made for these shapes alone; names and shapes decide.
    if before.keys() != after.keys():
        return  # The same for an optimizer that sorts parameters by shape.
    size = sum(map(jnp.size, leaves.values()))
    most_axes = max(array.ndim for array in larger.values())
    for path, array in before.items():
        owner, now = _owner(path, leaves), after[path].shape
        if owner is None:
            # Statistics of one axis of a tensor grow by less than a tensor does.
            grows = array.ndim == 1 and now[0] - array.shape[0] > most_axes
            mixes = grows and array.shape != (size,)
        elif array.size == 1:
            mixes = False
        else:
            mixes = _is_of(array.shape, leaves[owner].shape) and not _is_of(
                now, jnp.shape(larger.get(owner, leaves[owner]))
            )
        if mixes:
            raise ValueError(
                f"tx: its state {path!r} of shape {array.shape} mixes weights, so that "
                "those of pruned weights cannot be set to zero; take an optimizer with "
                "one entry for each weight, and leave out optax.flatten inside of "
                "optax.masked, optax.partition and the like"
            )


def _grown(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another number in every axis, and in no two the same."""
    return tuple(n + 1 + i for i, n in enumerate(shape))


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
    return by_path(found[0].masks)


def with_masks(params: Params, opt_state: Any, masks: MasksLike) -> tuple[Params, Any]:
    """Replaces the masks and applies them to parameters and optimizer state.

    Args:
        params: Any pytree.
        opt_state: State of :func:`masked`.
        masks: From path to bool, with the paths of the masks in the state, or a pytree
            of the parameters' structure.

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
    found, old = check_masks(params, masks), paired(params, masks_of(opt_state))
    if old.keys() != found.keys():
        raise ValueError(
            f"masks: expected those of {sorted(old)}, as in the optimizer's state, got "
            f"{sorted(found)}"
        )
    placed = {path: _placed_as(found[path], mask) for path, mask in old.items()}

    def replaced(state: Any) -> Any:
        if not _has_masks(state):
            return state
        return state._replace(masks=replace_leaves(state.masks, placed))

    opt_state = jax.tree.map(replaced, opt_state, is_leaf=_has_masks)
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


def _without_pruned(updates: Params, params: Params, masks: Masks) -> Params:
    """Updates that set pruned weights to exactly zero."""
    changes, masks = leaves_by_path(updates), paired(updates, masks)
    weights = dict(zip(changes, jax.tree.leaves(params), strict=True))
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
