"""Masks inside an optimizer of Optax: any training loop keeps pruned weights at zero.

    tx = wf.masked(tx, wf.init_masks(params))
    levels = dict(wf.gradual(start=0, end=500, frequency=100, initial=0.3, target=0.9))
    for step, batch in enumerate(batches):
        if step in levels:
            params, opt_state, info = wf.prune_masked(
                loss_fn, params, opt_state, samples, sparsity=levels[step]
            )
        params, opt_state = train_step(params, opt_state, batch)  # as it was

The masks live in the optimizer's state and nowhere else: the compiled step takes new
ones without being compiled anew, and none can be forgotten or out of date.
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
        inner_state: That of the optimizer inside; zero for pruned weights.
        masks: From path to bool, True = kept.
    """

    inner_state: Any
    masks: Masks


def masked(
    tx: optax.GradientTransformation, masks: Mapping[str, jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned weights, their gradients and their optimizer state at zero.

    The optimizer sees a zero gradient and no memory of a pruned weight w; its update
    is -w in place of whatever the optimizer says, so that a weight which is not zero
    yet (parameters from elsewhere) is zero after the step.

    Args:
        tx: Any optimizer, ``optax.MultiSteps`` included. Wrap the whole of it: what a
            chain does after ``masked`` is done to pruned weights as well.
        masks: From path to bool, as :func:`init_masks` or :func:`prune` return them.
            They are what the state starts with; new ones come by
            :func:`prune_masked` or :func:`with_masks`.

    Returns:
        An optimizer whose state is a :class:`MaskedState`. Its masks are copies, so
        that the state may be donated to a compiled step; each is placed on devices as
        its weight is.

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
        # Some optimizers add a constant to what they remember.
        return changes, MaskedState(mask_state(after, updates, masks), masks)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_state(state: Any, params: Params, masks: Mapping[str, jax.Array]) -> Any:
    """Sets what an optimizer remembers of pruned weights to zero.

    An array of the state belongs to a parameter if its path ends in the parameter's
    and it has the parameter's shape: momentum, means of gradients and of their squares.
    A number kept for a whole tensor stays.

    Args:
        state: The state of any optimizer of Optax.
        params: The parameters, or anything of their structure and shapes.
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
    """The masks inside an optimizer's state.

    Args:
        opt_state: Of :func:`masked`, however deep inside other transformations.

    Raises:
        ValueError: If there are none, or several.

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
    """Puts new masks on parameters and optimizer state.

    Args:
        params: Any pytree.
        opt_state: Of :func:`masked`.
        masks: From path to bool, of the same paths as those in the state.

    Returns:
        ``(params, opt_state)``, pruned weights and what is remembered of them zero.

    Raises:
        ValueError: If the state has no masks, or the new ones are of other parameters.
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
        opt_state: The optimizer's state; its masks say what is pruned already.
        samples: As for :func:`prune`.
        **options: As for :func:`prune`, but for ``masks`` and ``prunable``.

    Returns:
        ``(params, opt_state, info)``, on the devices that they were on.

    Raises:
        ValueError: If the state has no masks; and as :func:`prune`.

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
    """Updates that take pruned weights to exactly zero."""
    changes, weights = leaves_by_path(updates), leaves_by_path(params)
    # 0 - w, since -w makes a negative zero of a zero.
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
    """Whether a path is that of a leaf of the name; a bare array has the name ""."""
    return not name or path == name or path.endswith("/" + name)


def _placed_as(array: Any, other: Any) -> jax.Array:
    """A copy of an array on the devices of another; while tracing, where it is."""
    copy = jnp.array(array, copy=True)
    if isinstance(other, jax.core.Tracer) or not isinstance(other, jax.Array):
        return copy
    # Committed to its device, an array may make others move or compile anew.
    moves = copy.sharding != other.sharding
    return jax.device_put(copy, other.sharding) if moves else copy
