"""Masks: paired with parameters, checked, applied, counted.

Masks are a plain dict from parameter path to a boolean array of the parameter's shape,
True where the weight is kept. A path that is absent is not prunable. Every function
that takes masks takes a pytree of the parameters' structure as well, with None or the
scalar True for what is not prunable (:func:`by_path` and :func:`paired` read it);
:func:`masks_tree` returns one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.equations.thresholds import keep_highest as keep_highest
from woodfisher_jax.options import OptionError, shown
from woodfisher_jax.trees.paths import (
    Params,
    leaf_name,
    leaves_by_path,
    replace_leaves,
    weight_name,
)

Masks = dict[str, jax.Array]
MasksLike = Mapping[str, Any] | Any
"""Masks by path, or as a pytree of the parameters' structure."""


def by_path(masks: MasksLike) -> Masks:
    """Masks as a plain dict from path to array.

    Args:
        masks: By path, or a pytree of the parameters' structure. None and the scalar
            True stand for parameters that are not prunable.

    Returns:
        The dict, in the order of a given dict, else of the tree.

    Raises:
        TypeError: If a mask is not a boolean array.

    Example:
        >>> wf.masks.by_path({"layer": {"kernel": jnp.ones(2, bool), "bias": None}})
        {'layer/kernel': Array([ True,  True], dtype=bool)}
    """
    leaves = leaves_by_path(masks)
    if isinstance(masks, Mapping):
        # A dict in the state of an optimizer of NNX holds variables, which are nodes.
        names = {f"{path}/value": path for path in masks if isinstance(path, str)}
        leaves = {names.get(path, path): leaf for path, leaf in leaves.items()}
        if leaves.keys() == masks.keys():
            leaves = {path: leaves[path] for path in masks}  # tree_flatten sorts
    for path, mask in leaves.items():
        if not hasattr(mask, "shape") and not isinstance(mask, bool):
            raise TypeError(
                f"{leaf_name('masks', path)} is of type {type(mask).__name__}; "
                "expected a boolean array, True = kept, for each path"
            )
        dtype = getattr(mask, "dtype", np.dtype(bool))
        if dtype != np.bool_:
            raise TypeError(
                f"{leaf_name('masks', path)} has dtype {dtype}; expected bool, True = "
                "kept, for each path"
            )
    return {path: mask for path, mask in leaves.items() if not _is_unmasked(mask)}


def _is_unmasked(mask: Any) -> bool:
    return isinstance(mask, (bool, np.bool_)) and bool(mask)


def paired(params: Params, masks: MasksLike) -> Masks:
    """Masks by the paths that their parameters have in a tree.

    Args:
        params: Any pytree.
        masks: By path, or a pytree of the parameters' structure. A path with and one
            without ``value`` at its end (Flax NNX has both) are the same weight.

    Raises:
        ValueError: If masks name a parameter that does not exist.
        TypeError: If a mask is not a boolean array.

    Example:
        >>> masks = {"kernel/value": jnp.ones(2, bool)}
        >>> list(wf.masks.paired({"kernel": jnp.ones(2)}, masks))
        ['kernel']
    """
    return _paired(leaves_by_path(params), masks)


def _paired(paths: Iterable[str], masks: MasksLike) -> Masks:
    known = {weight_name(path): path for path in paths}
    found = {}
    for path, mask in by_path(masks).items():
        if weight_name(path) not in known:
            given = f"masks names {path!r}" if path else "masks is a single array"
            there = f"has {list(known.values())}"
            if list(known) == [""]:
                there = "is a single array"
            raise OptionError(
                "masks",
                f"{given}, which is not in params: that {there}; expected masks of "
                "some of its arrays, by path",
            )
        found[known[weight_name(path)]] = mask
    return found


def check_masks(params: Params, masks: MasksLike) -> Masks:
    """Masks by path, each a boolean array of its parameter's shape.

    Args:
        params: Any pytree of arrays.
        masks: By path, or a pytree of the parameters' structure.

    Returns:
        The masks by the paths of ``params``.

    Raises:
        ValueError: If masks is empty, names a parameter that does not exist, or a mask
            has another shape than its parameter.
        TypeError: If a mask is not boolean.
    """
    leaves = leaves_by_path(params)
    found = _paired(leaves, masks)
    if not found:
        raise _no_mask(masks, f" for some of {list(leaves)}")
    for path, mask in found.items():
        if jnp.size(mask) == 0:
            raise ValueError(f"masks[{path!r}] has no entries; leave it out of masks")
        if jnp.shape(mask) != leaves[path].shape:
            raise ValueError(
                f"masks[{path!r}] has shape {jnp.shape(mask)}; expected that of the "
                f"parameter, {leaves[path].shape}: masks are those of another network "
                "or of one that is smaller by now"
            )
    return found


def _no_mask(masks: MasksLike, where: str = "") -> OptionError:
    return OptionError(
        "masks",
        f"masks={shown(masks)} has no mask, for None and True stand for what is not "
        f"prunable; expected a boolean array, True = kept,{where or ' for each path'}",
    )


def left_out(*paths: str) -> str:
    """How to leave tensors out of what is prunable by default, for messages.

    Args:
        *paths: Of the tensors.
    """
    them = "it" if len(paths) == 1 else "them"
    return (
        f"leave {them} out by prunable=lambda path, array: path in axes and path not "
        f"in {list(paths)}, with axes = wf.find_axes(f, params, batch) of the "
        "function and inputs that you give here (or by masks)"
    )


def masks_tree(params: Params, masks: MasksLike) -> Any:
    """Masks as a pytree of the parameters' structure, for ``jax.tree.map``.

    A parameter without a mask has the scalar True, which broadcasts as an array of True
    does; functions that take masks take such a tree back. ``optax.masked`` expects one
    bool for each parameter: ``jax.tree.map(lambda m: m.ndim > 0, tree)`` selects the
    prunable ones.

    Args:
        params: Any pytree of arrays.
        masks: From path to bool, as :func:`woodfisher_jax.prune` returns them.

    Returns:
        The tree, with boolean arrays for leaves.

    Raises:
        ValueError: If a mask does not fit the parameters.
        TypeError: If a mask is not boolean.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
        >>> tree = wf.masks_tree(params, {"w": jnp.array([True, False])})
        >>> jax.tree.map(lambda p, m: (p * m).tolist(), params, tree)
        {'b': [3.0], 'w': [1.0, 0.0]}
    """
    found = check_masks(params, masks)
    # NumPy's, which unlike Python's has ndim and all().
    leaves = {path: found.get(path, np.True_) for path in leaves_by_path(params)}
    return replace_leaves(params, leaves)


def apply_masks(params: Params, masks: MasksLike) -> Params:
    """Sets pruned weights to exactly zero; other parameters are unchanged.

    Args:
        params: Any pytree, such as parameters or gradients.
        masks: From path to boolean array, or a pytree of the parameters' structure.

    Returns:
        The tree, with JAX's arrays for those that have masks: float64 of NumPy is
        float32 there unless ``jax_enable_x64`` is set.

    Raises:
        ValueError: If masks name a parameter that does not exist.
        TypeError: If a mask is not boolean.

    Example:
        >>> masks = {"w": jnp.array([True, False])}
        >>> wf.apply_masks({"w": jnp.array([1.0, 2.0])}, masks)["w"].tolist()
        [1.0, 0.0]
    """
    leaves = leaves_by_path(params)
    paired = _paired(leaves, masks)
    return replace_leaves(
        params, _masked({path: leaves[path] for path in paired}, paired)
    )


@jax.jit
def _masked(
    leaves: dict[str, jax.Array], masks: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Zero where the mask is False, as one program and not one for each shape."""
    # `where`, not a product: 0 * inf is not 0, and -1 * 0 is -0.
    return {
        path: jnp.where(mask, leaves[path], jnp.zeros((), leaves[path].dtype))
        for path, mask in masks.items()
    }


def count(masks: MasksLike) -> tuple[int, int]:
    """Counts kept weights and all prunable weights.

    Returns:
        ``(kept, prunable)``.

    Raises:
        TypeError: If a mask is not boolean.

    Example:
        >>> wf.masks.count({"w": jnp.array([True, False, False, False])})
        (1, 4)
    """
    found = by_path(masks)
    kept = sum(int(n) for n in _kept(found).values())
    return kept, sum(mask.size for mask in found.values())


@jax.jit
def _kept(masks: Masks) -> dict[str, jax.Array]:
    return {path: jnp.sum(mask) for path, mask in masks.items()}


def sparsity(masks: MasksLike) -> float:
    """Fraction of the prunable weights that are pruned, in [0, 1].

    Raises:
        ValueError: If there is no mask.
        TypeError: If a mask is not boolean.

    Example:
        >>> wf.sparsity({"w": jnp.array([True, False, False, False])})
        0.75
    """
    kept, prunable = count(masks)
    if not prunable:
        raise _no_mask(masks)
    return (prunable - kept) / prunable


def sparsity_by_path(masks: MasksLike) -> dict[str, float]:
    """Sparsity of each prunable parameter.

    Raises:
        TypeError: If a mask is not boolean.

    Example:
        >>> masks = {"v": jnp.array([True, False]), "w": jnp.array([True, True])}
        >>> wf.sparsity_by_path(masks)
        {'v': 0.5, 'w': 0.0}
    """
    # jit sorts dicts by key; the order of the masks is kept.
    found = by_path(masks)
    kept = _kept(found)
    return {
        path: (mask.size - int(kept[path])) / mask.size for path, mask in found.items()
    }


def num_kept(num_weights: int, target_sparsity: float) -> int:
    """How many of ``num_weights`` are kept: as many as the target sparsity allows.

    ``floor(n (1 - s))``, so that the target is always reached.

    Note: the original takes ``ceil(n (1 - s))`` in floating point and then loses the
    last weight and all its ties to a strict comparison: the same number as here, one
    less where n (1 - s) is an integer, and fewer with ties.

    Example:
        >>> wf.masks.num_kept(32_360, 0.9)
        3236
    """
    # 32,360 x (1 - 0.9) is 3,235.9999999999995 in floating point. The margin is below a
    # millionth: 1,000,001 x (1 - 0.000001) is 999,999.999999 and not a million.
    return math.floor(num_weights * (1.0 - target_sparsity) + 5e-7)


def most_sparse(num_weights: int) -> float:
    """The largest sparsity that leaves one of so many weights, rounded down.

    Example:
        >>> wf.masks.most_sparse(15)
        0.933
    """
    scale = 10 ** (len(str(num_weights)) + 1)
    return (num_weights - 1) * scale // num_weights / scale


def traced_num_kept(num_weights: int, target_sparsity: jax.Array) -> jax.Array:
    """:func:`num_kept` of a traced sparsity, which counts to six decimals.

    In integers, because ``n (1 - s)`` in float32 is off by one from about 1e6 weights.

    Args:
        num_weights: n, below 2e9.
        target_sparsity: s in [0, 1), scalar.
    """
    million = 1_000_000
    whole, rest = divmod(num_weights, million)
    left = million - jnp.round(target_sparsity * million).astype(jnp.uint32)
    # rest * left has 40 bits: the lower ten bits of rest are multiplied separately.
    high, low = divmod(rest, 1024)
    first = jnp.uint32(high) * left
    second = (first % million) * jnp.uint32(1024) + jnp.uint32(low) * left
    part = (first // million) * jnp.uint32(1024) + second // million
    return (jnp.uint32(whole) * left + part).astype(jnp.int32)
