"""The table of methods, and how one is looked up, changed and compared."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from woodfisher_jax.curvature.diagonal import DiagonalFisher, DiagonalHessian
from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.curvature.kronecker import Kronecker
from woodfisher_jax.curvature.method import Magnitude, Method
from woodfisher_jax.options import (
    OptionError,
    Options,
    check_known,
    fields_of,
    keywords,
    split,
)
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.trees import blocks

METHODS: dict[str, Method] = {
    "woodfisher": WoodFisher(
        summary="OBS with the inverse Fisher over all prunable weights at once",
        layout=blocks.full_matrix,
    ),
    "woodfisherblock": WoodFisher(
        summary="OBS with the inverse Fisher of blocks within each tensor",
        layout=blocks.within_tensors,
    ),
    "woodfisherblockdynamic": WoodFisher(
        summary="the same with blocks of active weights only, which grow on the way",
        layout=blocks.active_within_tensors,
    ),
    "woodfisherblockgroup": WoodFisher(
        summary="the same with blocks that cross tensor borders",
        layout=blocks.across_tensors,
    ),
    "woodfisherblock_flops": WoodFisher(
        summary="woodfisherblock under the name of its FLOP options",
        scopes=("global",),
        layout=blocks.within_tensors,
    ),
    "woodtaylor": WoodFisher(
        summary="woodfisher with the first-order term of the loss",
        layout=blocks.full_matrix,
        first_order=True,
    ),
    "woodtaylorblock": WoodFisher(
        summary="woodfisherblock with the first-order term of the loss",
        layout=blocks.within_tensors,
        first_order=True,
    ),
    "kfac": Kronecker(summary="OBS with the Kronecker-factored Fisher of each layer"),
    "diagfisher": DiagonalFisher(
        summary="OBD with the diagonal Fisher; the other weights stay"
    ),
    "naivehess": DiagonalHessian(
        summary="OBD with the diagonal of the Hessian; the other weights stay"
    ),
    "globalmagni": Magnitude(
        summary="smallest weights over all tensors", scopes=("global",)
    ),
    "magni": Magnitude(summary="smallest weights of each tensor", scopes=("layer",)),
}
"""Every method by name. A method of your own is added as ``METHODS[name] = ...``."""

DEFAULT = METHODS["woodfisherblock"].replace(update="joint", damping="auto")
"""The method where none is named: better than the paper's in one step, at any size.

The names of methods keep the paper's update (``sum``) and damping (1e-5).
"""

RECOMPUTATION = ("recompute", "recompute_schedule", "recompute_degree")
"""Options of the goal that need a curvature."""


def method_named(method: str | Method) -> Method:
    """A method of the table, or the one given.

    Raises:
        OptionError: If there is none of that name; the message lists those there are.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and isinstance(METHODS.get(method), Method):
        return METHODS[method]
    if method == "layerwise":
        raise OptionError(
            "method",
            "method='layerwise' is no pruning step: it needs no loss; expected "
            "wf.prune_layerwise(net_fn, params, inputs, sparsity=...), in a config "
            f"task='language', or a method of {list(METHODS)}",
        )
    close = difflib.get_close_matches(str(method), METHODS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise OptionError(
        "method",
        f"method={method!r} does not exist; choose from {list(METHODS)}.{hint}",
    )


def name_of(method: str | Method) -> str:
    """What a method is called in messages."""
    return method if isinstance(method, str) else type(method).__name__


def scope_of(method: str | Method, scope: str | None) -> str:
    """The scope to use: the one given, or the method's default.

    Raises:
        OptionError: If the method does not have that scope.
    """
    row = method_named(method)
    if scope is None:
        return row.scopes[0]
    if scope not in row.scopes:
        same = (
            name
            for name, other in METHODS.items()
            if scope in other.scopes
            and row == replace(other, summary=row.summary, scopes=row.scopes)
        )
        other = next((f", or method={name!r}" for name in same), "")
        raise OptionError(
            "scope",
            f"scope={scope!r} with method={name_of(method)!r}; expected one of "
            f"{list(row.scopes)}{other}",
        )
    return scope


def options_of(method: str | Method) -> tuple[type[Options], ...]:
    """The dataclasses whose fields are options of a step by this method."""
    return type(method_named(method)), Goal, Compute


def applicable(method: str | Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments without the options that only other methods have.

    For comparisons, where several methods are given one set of options.

    Args:
        method: By name, or itself.
        given: Arguments of :func:`woodfisher_jax.prune` by name.
    """
    return {name: value for name, value in given.items() if has(method, name)}


def has(method: str | Method, option: str) -> bool:
    """Whether a name is no option of other methods alone."""
    return _owns(method_named(method), option) or not having(option)


def having(option: str) -> list[str]:
    """The methods of the table that have an option."""
    rows = {name: row for name, row in METHODS.items() if isinstance(row, Method)}
    return [name for name, row in rows.items() if _owns(row, option)]


def _owns(row: Method, option: str) -> bool:
    """Whether an option is the method's, or one of its curvature's recomputation."""
    recomputes = option in RECOMPUTATION and row.needs_samples
    return recomputes or option in fields_of(type(row))


def check_option(name: str, method: str | Method) -> None:
    """Raises if an option is one of other methods.

    Raises:
        OptionError: Naming the methods that have it.
    """
    if not has(method, name):
        raise OptionError(
            name,
            f"{name} is no option of method={name_of(method)!r}; expected a method "
            f"that has it: {having(name)}",
        )


def check_names(
    given: Mapping[str, Any],
    method: str | Method,
    *functions: Callable[..., Any],
    without: str = "",
) -> None:
    """Raises unless functions, or a step by a method, take what is given by name.

    Args:
        given: By name.
        method: By name, or itself.
        *functions: The one that was called, and those that it passes arguments on to.
        without: What the first gives the others itself.

    Raises:
        OptionError: With the nearest name that is taken, and all of them.
    """
    fields = [name for section in options_of(method) for name in fields_of(section)]
    names = dict.fromkeys(keywords(*functions) + fields)
    known = [name for name in names if name != without]
    where = f"wf.{functions[0].__name__} with method={name_of(method)!r}"
    for name in given:
        check_option(name, method)
        check_known(name, known, where)


def resolve(
    method: str | Method, compute: Compute, options: Mapping[str, Any]
) -> tuple[Method, Goal, Compute]:
    """The method, goal and compute that options by name amount to.

    Raises:
        OptionError: If no dataclass has an option, or a value is out of range.
    """
    for name in options:
        check_option(name, method)
    where = f"method={name_of(method)!r}"
    sections = (method_named(method), Goal(), compute)
    row, goal, found = split(options, *sections, where=where)
    assert isinstance(row, Method)
    assert isinstance(goal, Goal)
    assert isinstance(found, Compute)
    scope = scope_of(method, goal.scope)
    if goal.counts_macs and "global" not in row.scopes:
        name = "flops_power" if goal.flops_target is None else "flops_target"
        raise OptionError(
            name,
            f"{name}={getattr(goal, name)} with {where}, which has a threshold for "
            "each layer; expected a method with a global one",
        )
    if goal.flops_power and not row.allows_costs:
        raise OptionError(
            "flops_power",
            f"flops_power={goal.flops_power} with {where}, whose saliency may be "
            "negative; expected 0",
        )
    return row, goal.resolved(scope), found


def check_together(
    method: str | Method,
    row: Method,
    goal: Goal,
    mean_samples: Any,
    targets: Any,
) -> None:
    """Raises if options of different dataclasses contradict one another.

    Raises:
        OptionError: Naming what contradicts what.
    """
    for name, given in (("mean_samples", mean_samples), ("targets", targets)):
        if given is not None and not row.first_order:
            having = [name for name, other in METHODS.items() if other.first_order]
            raise OptionError(
                name,
                f"{name} has no meaning with method={name_of(method)!r}; expected a "
                f"method of first order, one of {having}",
            )
    if not isinstance(row, WoodFisher):
        return
    others = (goal.pattern, goal.flops_target, goal.flops_power or None)
    if row.swaps and (goal.scope != "global" or any(o is not None for o in others)):
        raise OptionError(
            "swaps",
            f"swaps={row.swaps} with scope={goal.scope!r}, pattern={goal.pattern!r}, "
            f"flops_target={goal.flops_target} and flops_power={goal.flops_power}; "
            "swaps follow the loss of the joint update alone: expected scope='global' "
            "and none of the others",
        )
    if targets is not None and (
        row.centered or mean_samples is not None or goal.recompute
    ):
        raise OptionError(
            "targets",
            "targets are values for the rows of one Fisher; expected centered=False, "
            "mean_samples=None and recompute=0 with them",
        )
    if row.update == "joint" and mean_samples is not None:
        raise OptionError(
            "mean_samples",
            "mean_samples with update='joint', which takes the mean of the Fisher's "
            "own gradients; expected mean_samples=None",
        )
