"""Which parameters are prunable: what the caller says, or what layers multiply."""

import re
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.masks import Masks, MasksLike, check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, weight_name

IS_KERNEL = re.compile(r"(^|/)kernel(/value)?$")
NO_WEIGHTS = re.compile(
    r"bias|scale|norm|emb|pos|cls|class|token|table|vocab|wte|wpe|(^|/)pe(/|$)"
    r"|latents|prompt|register|codebook",
    re.IGNORECASE,
)
"""Names of what has two or more dimensions and may be no weight of a layer. They are
refused, not left out: "compose" has a "pos", and a tied embedding is a classifier."""

Prunable = Callable[[str, jax.Array], bool] | str | None


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """The default predicate: arrays of two or more dimensions are prunable.

    Example:
        >>> is_kernel("layer/kernel", jnp.ones((2, 3)))
        True
    """
    del path
    return leaf.ndim >= 2


def init_masks(
    params: Params, prunable: Prunable = None, axes: Axes | None = None
) -> Masks:
    """All-True masks over the prunable parameters.

    Args:
        params: Any pytree of arrays.
        prunable: A predicate on (path, array), or a regular expression searched in the
            path, with and without the ``value`` of Flax NNX at its end; default the
            weights of dense layers and convolutions that ``axes`` has, else
            :func:`is_kernel`, and what has a name of an embedding, a position or a
            norm (``NO_WEIGHTS``) is refused.
        axes: From :func:`woodfisher_jax.find_axes`; by default, and where no layer was
            found, shapes tell.

    Returns:
        Masks with every weight kept.

    Raises:
        ValueError: If no parameter is selected, the expression is not valid, or it
            cannot be told without one what is a weight of a layer.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> list(wf.init_masks(params))
        ['kernel']
        >>> list(wf.init_masks(params, prunable="bias"))
        ['bias']
    """
    leaves = leaves_by_path(params)
    selects = _predicate(prunable)
    if prunable is None:
        selects = partial(_is_weight, axes=axes)
    masks = {
        path: jax.device_put(np.ones(leaf.shape, bool))
        for path, leaf in leaves.items()
        if leaf.size and selects(path, leaf)
    }
    if not masks:
        shown = ", ".join(f"{path} {leaf.shape}" for path, leaf in leaves.items())
        raise OptionError(
            "prunable",
            f"prunable={prunable!r} selects none of the parameters; expected a "
            f"predicate or a regular expression that matches some of: {shown}",
        )
    return masks


def _is_weight(path: str, leaf: jax.Array, axes: Axes | None) -> bool:
    """Whether an array is the weight of a layer, as far as that can be told."""
    how = (
        "say what is prunable by a regular expression, such as prunable='kernel', or "
        "by a predicate on (path, array)"
    )
    if not is_kernel(path, leaf):
        return False
    if not axes:
        if NO_WEIGHTS.search(path) and not IS_KERNEL.search(path):
            raise OptionError(
                "prunable",
                f"prunable=None: whether {path!r} of shape {leaf.shape} is the weight "
                "of a layer cannot be told without a loss; give loss_fn and samples "
                f"(or axes=wf.find_axes(loss_fn, params, batch)), or {how}",
            )
        return True
    if path in axes and not axes[path].multiplied:
        raise OptionError(
            "prunable",
            f"prunable=None: {path!r} of shape {leaf.shape} {axes[path].doubt}, so "
            f"that it cannot be told whether it is the weight of a layer; {how}",
        )
    return path in axes


def _predicate(prunable: Prunable) -> Callable[[str, jax.Array], bool]:
    if prunable is None:
        return is_kernel
    if callable(prunable):
        return partial(_selected, prunable)
    if not isinstance(prunable, str):
        raise TypeError(
            f"prunable={prunable!r}; expected a predicate on (path, array) or a "
            "regular expression"
        )
    try:
        pattern = re.compile(prunable)
    except re.error as error:
        raise OptionError(
            "prunable",
            f"prunable={prunable!r} is not a regular expression ({error}); expected "
            "one that some paths match, such as 'kernel$'",
        ) from error
    return lambda path, leaf: bool(
        pattern.search(path) or pattern.search(weight_name(path))
    )


def _selected(
    prunable: Callable[[str, jax.Array], bool], path: str, leaf: jax.Array
) -> bool:
    try:
        return bool(prunable(path, leaf))
    except Exception as error:
        raise OptionError(
            "prunable",
            f"prunable fails on {path!r} of shape {leaf.shape} "
            f"({type(error).__name__}: {error}); expected a predicate on (path, array) "
            "or a regular expression",
        ) from error


def given_masks(
    params: Params,
    masks: MasksLike | None,
    prunable: Prunable = None,
    axes: Axes | None = None,
) -> Masks:
    """The masks that are given, checked; or of what is prunable, with nothing pruned.

    Args:
        params: Any pytree of arrays.
        masks: As for :func:`check_masks`; None for those of :func:`init_masks`.
        prunable: As for :func:`init_masks`, if no masks are given.
        axes: As for :func:`init_masks`.

    Returns:
        The masks by the paths of ``params``.

    Raises:
        ValueError: If there are both masks and ``prunable``, or as for either function.
        TypeError: If a mask is not boolean.
    """
    if masks is None:
        return init_masks(params, prunable, axes)
    if prunable is not None:
        raise OptionError(
            "prunable",
            f"prunable={prunable!r} together with masks, which say already what is "
            "prunable; give one of the two",
        )
    return check_masks(params, masks)
