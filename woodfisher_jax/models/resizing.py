"""Models with the widths of a network from which structure was taken out."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from woodfisher_jax.models.layers import Resizable
from woodfisher_jax.trees.paths import leaves_by_path

_WEIGHTS = ("kernel", "embedding")

_MOST_LISTED = 5


def resized(model: nn.Module, variables: Any, *inputs: Any) -> nn.Module:
    """The model whose layers are as wide as those of some variables.

    Args:
        model: A network of this package, of the sizes before structure was taken out.
        variables: ``{"params": ..., "batch_stats": ...}`` of the model with fewer
            outputs of some layers; arrays or shapes.
        *inputs: What it is called with, such as images; arrays or shapes.

    Returns:
        The model, with ``widths`` of the layers that are different; ``model`` itself
        where none is. An attention layer has as many heads as its width holds.

    Raises:
        ValueError: If variables and model do not fit each other, with the path and both
            shapes; of another depth, say, or without part of a head.

    Example:
        >>> import jax.numpy as jnp
        >>> from woodfisher_jax.models import build_model, resized
        >>> small = {"fc1": {"kernel": jnp.ones((784, 30))},
        ...          "fc2": {"kernel": jnp.ones((30, 20))},
        ...          "fc3": {"kernel": jnp.ones((20, 10))}}
        >>> images = jnp.ones((1, 28, 28, 1))
        >>> dict(resized(build_model("mlp"), {"params": small}, images).widths)
        {'fc1': 30}
    """
    expected = _shapes(model, inputs)
    if not isinstance(variables, Mapping) or variables.keys() != expected.keys():
        names = [*variables] if isinstance(variables, Mapping) else type(variables)
        collections = ", ".join(f"{name!r}: ..." for name in expected)
        raise ValueError(f"variables has {names}; expected {{{collections}}}")
    found, usual = layer_outputs(variables), layer_outputs(expected)
    widths = {k: found[k] for k, n in usual.items() if found.get(k, n) != n}
    small = model
    if widths and isinstance(model, Resizable):
        small = model.clone(widths={**model.widths, **widths})
    given, expected = map(leaves_by_path, (variables, _shapes(small, inputs)))
    wrong = [
        f"{path}: got {_shape(given, path)}, expected {_shape(expected, path)}"
        for path in dict.fromkeys([*expected, *given])
        if _shape(given, path) != _shape(expected, path)
    ]
    if wrong:
        more = f"; and {len(wrong) - _MOST_LISTED} more" if wrong[_MOST_LISTED:] else ""
        raise ValueError(
            f"variables do not fit {type(model).__name__} with layers of their widths: "
            f"{'; '.join(wrong[:_MOST_LISTED])}{more}. What is added, normalised or "
            "read together has to be taken out together"
        )
    return small


def layer_outputs(variables: Any) -> dict[str, int]:
    """Outputs of each layer, by its path without the collection.

    Args:
        variables: ``{"params": ...}`` and other collections; arrays or shapes.
    """
    return {
        layer.removeprefix("params/"): leaf.shape[-1]
        for path, leaf in leaves_by_path(variables).items()
        for layer, _, name in [path.rpartition("/")]
        if name in _WEIGHTS
    }


def narrowed(model: nn.Module, found: Mapping[str, int], *inputs: Any) -> nn.Module:
    """The model with fewer outputs of the layers that have fewer elsewhere.

    Args:
        model: A network of this package.
        found: Outputs of its layers in a file, by path; others may be there.
        *inputs: As for `resized`.

    Returns:
        The model, with ``widths`` of these layers as far as it takes them, for the
        outputs of a classifier are its classes; ``model`` itself where it takes none.

    Raises:
        ValueError: If an attention layer has part of a head.
    """
    if not isinstance(model, Resizable):
        return model
    usual = layer_outputs(_shapes(model, inputs))
    fewer = {k: found[k] for k, n in usual.items() if found.get(k, n) < n}
    if not fewer:
        return model
    widths = {**model.widths, **fewer}
    taken = layer_outputs(_shapes(model.clone(widths=widths), inputs))
    widths = {k: n for k, n in widths.items() if taken.get(k) == n}
    return model if widths == model.widths else model.clone(widths=widths)


def check_widths(widths: Mapping[str, int], variables: Any) -> None:
    """Raises unless a network has the widths that were asked for.

    Args:
        widths: As those of `Resizable`.
        variables: That the network with these widths was initialised with; arrays or
            shapes.

    Raises:
        ValueError: With the first layer that is not there or has other outputs.
    """
    found = layer_outputs(variables)
    for layer, outputs in widths.items():
        if layer not in found:
            raise ValueError(
                f"widths[{layer!r}]: there is no such layer; expected paths such as "
                f"{', '.join(list(found)[:3])}"
            )
        if found[layer] != outputs:
            raise ValueError(
                f"widths[{layer!r}]={outputs}; expected {found[layer]}, which other "
                "layers or the number of classes decide"
            )


def _shapes(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def _shape(leaves: Mapping[str, Any], path: str) -> tuple[int, ...] | str:
    return tuple(leaves[path].shape) if path in leaves else "none"
