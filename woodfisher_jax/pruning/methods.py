"""The table of methods: each answers what curvature, which statistic, which update."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax

from woodfisher_jax.pruning import obs
from woodfisher_jax.pruning.blocks import (
    FlatOrder,
    Layout,
    full_matrix,
    within_tensors,
)


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        summary: One line for people.
        statistic: Elementwise saliency; takes the weights and, where the method has a
            curvature, its diagonal.
        scopes: What a threshold may span, the default first: "global" (one for all
            tensors) or "layer" (one a tensor).
        curvature: None, "diagonal" (of the Fisher) or "inverse" (of its blocks).
        layout: For "inverse": (flat order, block size) -> which weights share a block.
        direction: For "inverse": the vector b of the update δw = F⁻¹b.
    """

    summary: str
    statistic: Callable[..., jax.Array]
    scopes: tuple[str, ...]
    curvature: str | None = None
    layout: Callable[[FlatOrder, int | None], Layout] | None = None
    direction: Callable[..., jax.Array] | None = None


METHODS = {
    "woodfisher": Method(
        "OBS with the inverse Fisher over all prunable weights at once",
        obs.obs_saliency,
        ("global", "layer"),
        "inverse",
        full_matrix,
        obs.obs_direction,
    ),
    "woodfisherblock": Method(
        "OBS with the inverse Fisher of blocks within each tensor",
        obs.obs_saliency,
        ("global", "layer"),
        "inverse",
        within_tensors,
        obs.obs_direction,
    ),
    "diagfisher": Method(
        "OBD with the diagonal Fisher; the other weights stay",
        obs.obd_saliency,
        ("global", "layer"),
        "diagonal",
    ),
    "globalmagni": Method(
        "smallest weights over all tensors", obs.magnitude, ("global",)
    ),
    "magni": Method("smallest weights of each tensor", obs.magnitude, ("layer",)),
}


def method_named(name: str) -> Method:
    """Looks a method up.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(str(name), METHODS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"method={name!r} does not exist; choose from {list(METHODS)}.{hint}"
    )


def scope_of(name: str, scope: str | None) -> str:
    """The scope to use: the one asked for, or the method's default.

    Raises:
        ValueError: If the method does not have that scope.
    """
    scopes = method_named(name).scopes
    if scope is None:
        return scopes[0]
    if scope not in scopes:
        raise ValueError(
            f"scope={scope!r} with method={name!r}; expected one of {list(scopes)}"
        )
    return scope
