"""Leaves of a pytree by path: the names of weights and masks."""

from collections.abc import Mapping
from typing import Any

import jax

Params = Any
"""Any pytree of floating-point arrays, the user's own; its structure never changes."""


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def weight_name(path: str) -> str:
    """The path of a weight without the ``value`` at its end.

    The variables of Flax NNX are nodes with a leaf ``value`` in ``nnx.state``, and the
    leaf itself in ``nnx.as_pure``; an optimizer of NNX is given both.

    Example:
        >>> from woodfisher_jax.trees.paths import weight_name
        >>> weight_name("encode/kernel/value"), weight_name("encode/kernel")
        ('encode/kernel', 'encode/kernel')
    """
    while path.endswith("/value"):
        path = path.removesuffix("/value")
    return path


def leaf_name(tree: str, path: str) -> str:
    """What messages call a leaf; a tree may be a single leaf, with the path "".

    Example:
        >>> from woodfisher_jax.trees.paths import leaf_name
        >>> leaf_name("masks", "layer/kernel"), leaf_name("masks", "")
        ("masks['layer/kernel']", 'masks')
    """
    return f"{tree}[{path!r}]" if path else tree


def leaves_by_path(params: Params) -> dict[str, jax.Array]:
    """Names every leaf by its path, such as ``layer1/block0/conv1/kernel``.

    Args:
        params: Any pytree.

    Returns:
        A dict from path to leaf, in the tree's own order.

    Raises:
        ValueError: If two leaves have the same path, as in {"a/b": x, "a": {"b": y}}.

    Example:
        >>> from woodfisher_jax.trees.paths import leaves_by_path
        >>> leaves_by_path({"layer": {"kernel": 1.0, "bias": 2.0}})
        {'layer/bias': 2.0, 'layer/kernel': 1.0}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        names = [_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"params has two leaves with the path {twice!r}; rename a key that has "
            "a slash"
        )
    return named


def replace_leaves(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Returns the tree with the named leaves replaced and all others unchanged.

    Args:
        params: Any pytree.
        leaves: From path to the new leaf; each path must exist in ``params``, with or
            without ``value`` at its end (:func:`weight_name`).

    Raises:
        KeyError: If a path is not in the tree.

    Example:
        >>> from woodfisher_jax.trees.paths import replace_leaves
        >>> replace_leaves({"layer": {"kernel": 1.0, "bias": 2.0}}, {"layer/bias": 0.0})
        {'layer': {'bias': 0.0, 'kernel': 1.0}}
    """
    known = leaves_by_path(params)
    names = {weight_name(path) for path in known}
    unknown = [path for path in leaves if weight_name(path) not in names]
    if unknown:
        raise KeyError(
            f"no leaf of params is called {unknown[0]!r}; expected some of "
            f"{list(known)}"
        )
    new = {weight_name(path): leaf for path, leaf in leaves.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(weight_name(_name(path)), leaf), params
    )
