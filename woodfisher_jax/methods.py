"""The table of methods: each answers what curvature, which statistic, which update."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from woodfisher_jax.equations import obs
from woodfisher_jax.trees.blocks import (
    FlatOrder,
    Layout,
    across_tensors,
    active_within_tensors,
    full_matrix,
    within_tensors,
)

CURVATURES = ("inverse", "kronecker", "diagonal", "hessian")
"""Kinds of curvature: F⁻¹ of blocks and the inverse of Kronecker factors, both damped;
diag(F) and diag(H), as they are."""


UPDATES = ("sum", "joint", "none")
"""How the other weights move: by the sum of single-weight updates, by the minimum with
all that goes taken together, or not at all."""


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        summary: One line for people.
        statistic: Elementwise saliency; takes the weights and, where the method has a
            curvature, its diagonal.
        scopes: What a threshold may span, the default first: "global" (one for all
            tensors) or "layer" (one a tensor).
        curvature: None or one of CURVATURES.
        layout: For "inverse": (flat order, block size, active weights) -> which weights
            share a block.
        direction: The vector b of the update δw = F⁻¹b; None if the others stay.
        first_order: Whether the loss has a slope: statistic and direction are then
            taken at w - h, h = F⁻¹ḡ, and h is part of the update.
    """

    summary: str
    statistic: Callable[..., jax.Array]
    scopes: tuple[str, ...]
    curvature: str | None = None
    layout: Callable[[FlatOrder, int | None, np.ndarray | None], Layout] | None = None
    direction: Callable[..., jax.Array] | None = None
    first_order: bool = False


BOTH = ("global", "layer")

METHODS = {
    "woodfisher": Method(
        "OBS with the inverse Fisher over all prunable weights at once",
        obs.obs_saliency,
        BOTH,
        "inverse",
        full_matrix,
        obs.obs_direction,
    ),
    "woodfisherblock": Method(
        "OBS with the inverse Fisher of blocks within each tensor",
        obs.obs_saliency,
        BOTH,
        "inverse",
        within_tensors,
        obs.obs_direction,
    ),
    "woodfisherblockdynamic": Method(
        "the same with blocks of the active weights only, which grow as weights go",
        obs.obs_saliency,
        BOTH,
        "inverse",
        active_within_tensors,
        obs.obs_direction,
    ),
    "woodfisherblockgroup": Method(
        "the same with blocks that cross tensor borders",
        obs.obs_saliency,
        BOTH,
        "inverse",
        across_tensors,
        obs.obs_direction,
    ),
    "woodfisherblock_flops": Method(
        "woodfisherblock under the name of its FLOP options",
        obs.obs_saliency,
        ("global",),
        "inverse",
        within_tensors,
        obs.obs_direction,
    ),
    "woodtaylor": Method(
        "woodfisher with the first-order term of the loss",
        obs.obs_saliency,
        BOTH,
        "inverse",
        full_matrix,
        obs.obs_direction,
        first_order=True,
    ),
    "woodtaylorblock": Method(
        "woodfisherblock with the first-order term of the loss",
        obs.obs_saliency,
        BOTH,
        "inverse",
        within_tensors,
        obs.obs_direction,
        first_order=True,
    ),
    "kfac": Method(
        "OBS with the Kronecker-factored Fisher of each layer",
        obs.obs_saliency,
        BOTH,
        "kronecker",
        direction=obs.obs_direction,
    ),
    "diagfisher": Method(
        "OBD with the diagonal Fisher; the other weights stay",
        obs.obd_saliency,
        BOTH,
        "diagonal",
    ),
    "naivehess": Method(
        "OBD with the diagonal of the Hessian; the other weights stay",
        obs.obd_saliency,
        BOTH,
        "hessian",
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


# ---------------------------------------------------------------- options of some rows


class Option(NamedTuple):
    """An option that only some methods have.

    Attributes:
        default: Its value where it is not used.
        applies: Which methods have it.
    """

    default: Any
    applies: Callable[[Method], bool]


def _ranks_globally(row: Method) -> bool:
    return "global" in row.scopes


def _has_costs(row: Method) -> bool:
    # A negative curvature makes a negative score, which a factor below 1 would raise.
    return "global" in row.scopes and row.curvature != "hessian"


def _in_blocks(row: Method) -> bool:
    return row.curvature == "inverse"


def _updates(row: Method) -> bool:
    return row.direction is not None


def _is_damped(row: Method) -> bool:
    return row.curvature in ("inverse", "kronecker")


def _is_estimated(row: Method) -> bool:
    return row.curvature is not None


def _or_by_magnitude(applies: Callable[[Method], bool]) -> Callable[[Method], bool]:
    """Methods without a curvature are compared with others under one set of options."""
    return lambda row: row.curvature is None or applies(row)


OPTIONS = {
    "damping": Option(1e-5, _or_by_magnitude(_is_damped)),
    "block_size": Option(None, _or_by_magnitude(_in_blocks)),
    "solver": Option("auto", _or_by_magnitude(_in_blocks)),
    "store": Option("auto", _or_by_magnitude(_in_blocks)),
    "store_dtype": Option("float32", _or_by_magnitude(_in_blocks)),
    "scale_update": Option(1.0, _or_by_magnitude(_updates)),
    "weight_decay": Option(0.0, _is_damped),
    "update": Option("sum", _in_blocks),
    "centered": Option(False, _in_blocks),
    "mean_samples": Option(None, lambda row: row.first_order),
    "auto_damping": Option(False, _or_by_magnitude(_in_blocks)),
    "damping_search_samples": Option(0, _or_by_magnitude(_is_damped)),
    "match": Option("none", lambda row: row.first_order),
    "targets": Option(None, lambda row: row.first_order),
    "normalize_update": Option(None, _updates),
    "swaps": Option(0, _or_by_magnitude(_in_blocks)),
    "pi": Option(False, lambda row: row.curvature == "kronecker"),
    "hessian": Option("exact", lambda row: row.curvature == "hessian"),
    "num_probes": Option(64, lambda row: row.curvature == "hessian"),
    "probe_seed": Option(0, lambda row: row.curvature == "hessian"),
    "flops_power": Option(0.0, _has_costs),
    "flops_per_parameter": Option(False, _has_costs),
    "flops_normalize": Option("none", _has_costs),
    "flops_target": Option(None, _ranks_globally),
    "recompute": Option(0, _is_estimated),
}
"""Options of :func:`woodfisher_jax.prune`, and ``auto_damping``, ``match`` and
``damping_search_samples`` of a run, that make no sense for some methods. Methods by
magnitude take those of curvature in general, and have no use for them."""

GOALS = ("flops_power", "flops_per_parameter", "flops_normalize", "flops_target")
"""Options that say what is wanted, not how it is found: never left out."""


def applicable(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults where they make no sense for a method.

    For comparisons, where several methods are given one set of options.

    Args:
        name: Of the method.
        given: Options of OPTIONS, by name.
    """
    row = method_named(name)
    return {
        key: value
        if key in GOALS or OPTIONS[key].applies(row)
        else OPTIONS[key].default
        for key, value in given.items()
    }


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """Raises if a method is given an option that makes no sense for it.

    Args:
        name: Of the method.
        given: Options of OPTIONS, by name; a default is as good as none.

    Raises:
        ValueError: Naming the option and the methods that have it.
    """
    row = method_named(name)
    for key, value in given.items():
        option = OPTIONS[key]
        is_default = value is option.default or (
            isinstance(value, (int, float, str)) and value == option.default
        )
        if is_default or option.applies(row):
            continue
        having = [other for other, row in METHODS.items() if option.applies(row)]
        shown = f"{key}={value!r}" if np.isscalar(value) else key
        raise ValueError(
            f"{shown} makes no sense with method={name!r}; expected one of {having}, "
            f"or {key}={option.default!r}"
        )
