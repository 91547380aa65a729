"""What layer-wise pruning is given, checked alone and together."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.options import OptionError, checked, fields_of
from woodfisher_jax.rows.inputs import as_inputs, check_not_zero, counted_inputs
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.named_patterns import GroupNames, Pattern, parse
from woodfisher_jax.selection.structures import Structures
from woodfisher_jax.tracing.segments import Program, floats
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaf_name, leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import regroup


def rule_of(pattern: str | GroupNames | Structures | None) -> Pattern | None:
    """The pattern, which has to be N:M or structures."""
    if pattern == "heads":
        # Not the pattern of that name, which leaves what makes and reads them.
        pattern = "structures"
        rule = parse(pattern)
        return rule if rule is None else rule._replace(name="heads", kinds=("heads",))
    taken = "N:M such as 2:4, 'structures', 'channels', 'neurons' or 'heads', or none"
    rule = parse(pattern, taken)
    if rule is not None and rule.size is None and not rule.kinds:
        raise OptionError(
            "pattern",
            f"pattern={rule.name!r} in layer-wise pruning; expected {taken}; wf.prune "
            "and wf.prune_outputs know the others",
        )
    return rule


def check_together(program: Program, settings: Layerwise, rule: Pattern | None) -> None:
    """Raises if what is beyond single layers does not fit the network or pattern."""
    if settings.scope == "global" and rule is not None:
        raise OptionError(
            "scope",
            f"scope='global' with pattern={rule.name!r}, which has one sparsity for "
            "all layers; expected scope='layer'",
        )
    floating = any(
        jnp.issubdtype(v.aval.dtype, jnp.floating)
        for v in program.jaxpr.outvars
        if v in program.varies
    )
    for name, asked in (
        ("distil", settings.distil),
        ("scope", settings.scope == "global"),
    ):
        if asked and not floating:
            raise OptionError(
                name,
                f"{name}={getattr(settings, name)!r}: net_fn returns no floating-point "
                "numbers that depend on the inputs; expected outputs such as logits",
            )


def without_effect(settings: Layerwise, given: Iterable[str]) -> list[str]:
    """A sentence for each option that is given and that the others leave unused.

    Args:
        settings: All options.
        given: Names of those that the caller gave.
    """
    default = Layerwise()
    return [
        f"{name}={getattr(settings, name)!r} has no effect without {other}"
        for name, other in unused(settings).items()
        if name in given and getattr(settings, name) != getattr(default, name)
    ]


def unused(settings: Layerwise) -> dict[str, str]:
    """The options that others leave without effect, and what they need."""
    is_global = settings.scope == "global"
    needs = {
        "spread": (is_global, "scope='global'"),
        "sensitivity_examples": (is_global, "scope='global'"),
        "seed": (is_global, "scope='global'"),
        "metric": (is_global or settings.distil, "scope='global' or distil"),
    }
    return {name: other for name, (used, other) in needs.items() if not used}


def check_no_budget(shares: Mapping[str, float | None]) -> None:
    """Raises if there are budgets without structures."""
    for name, share in shares.items():
        if share is not None:
            raise OptionError(
                name,
                f"{name}={share} without structures; expected pattern='structures', "
                "'channels', 'neurons' or 'heads' with it, or a sparsity",
            )


def check_times(times: Any, latency: float | None, *, timed: bool = False) -> None:
    """Raises unless a file of times is one, and there is something to use it for.

    Args:
        times: Name of the file, or None.
        latency: Without which nothing is timed.
        timed: Whether structures that were given have been timed.
    """
    if times is None:
        return
    if not isinstance(times, (str, os.PathLike)):
        raise OptionError(
            "times",
            f"times is of type {type(times).__name__}; expected the name of a JSON "
            "file, new or written by an earlier call",
        )
    if latency is None:
        raise OptionError(
            "times",
            f"times={str(times)!r} without a latency, for which alone products are "
            "timed; expected latency=..., such as latency=0.5, or no times",
        )
    if timed:
        raise OptionError(
            "times",
            f"times={str(times)!r} with a pattern whose structures are timed already, "
            "so that nothing would be read from it or written; expected no times, or "
            "pattern=wf.structures(net_fn, params, inputs), which has none yet",
        )


def check_differentiable(
    net_fn: Callable[[Params, Any], Any],
    params: Params,
    inputs: Any,
    masks: Masks,
    settings: Layerwise,
) -> None:
    """Raises if gradients are asked for that the network does not have.

    Args:
        net_fn: The network.
        params: Its parameters.
        inputs: Shapes of a batch.
        masks: Of the tensors that gradients are formed of, or of later layers.
        settings: What is asked for.
    """
    asked = {
        "repair": settings.repair > 0,
        "distil": settings.distil > 0,
        "scope": settings.scope == "global",
    }
    name = next((name for name, asked in asked.items() if asked), None)
    if name is None:
        return

    def slopes(leaves: dict[str, Any], params: Params, inputs: Any) -> Any:
        def outputs(leaves: dict[str, Any]) -> list[Any]:
            found = net_fn(replace_leaves(params, leaves), inputs)
            return floats(jax.tree.leaves(found))

        found, pull = jax.vjp(outputs, leaves)
        return pull(found)

    leaves = leaves_by_path(params)
    try:
        jax.eval_shape(slopes, {path: leaves[path] for path in masks}, params, inputs)
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise OptionError(
            name,
            f"{name}={getattr(settings, name)!r}: net_fn has no gradients ({reason}); "
            "expected lax.scan in place of lax.while_loop, a net_fn that ends before "
            "what has none, or no repair, distil and scope='global'",
        ) from error


def level_of(sparsity: float | None, rule: Pattern | None) -> float:
    """The sparsity, which is that of a pattern where there is one."""
    if sparsity is None and rule is not None:
        sparsity = rule.sparsity
    sparsity = checked(fields_of(Goal)["sparsity"], sparsity)
    if sparsity is None:
        raise OptionError(
            "sparsity", "sparsity is missing; expected a fraction, such as 0.6"
        )
    if rule is not None and rule.size and abs(sparsity - (rule.sparsity or 0.0)) > 1e-6:
        raise OptionError(
            "sparsity",
            f"sparsity={sparsity} with pattern={rule.name!r}; expected "
            f"{rule.sparsity}, or no sparsity",
        )
    return sparsity


def check_finite(params: Params, masks: Masks) -> None:
    """Raises if a parameter has NaN, or one that is pruned infinity.

    Others may have infinity, such as -inf where attention does not look.

    Args:
        params: Any pytree of arrays; shapes pass.
        masks: Of the tensors that are pruned.

    Raises:
        OptionError: With the path of the first.
    """
    for path, leaf in leaves_by_path(params).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        wrong = ~jnp.isfinite(leaf) if path in masks else jnp.isnan(leaf)
        count = int(wrong.sum())
        if count:
            what = "NaN or infinity" if path in masks else "NaN"
            raise OptionError(
                "params",
                f"{leaf_name('params', path)} of shape {leaf.shape} has {count} "
                f"entries that are {what}; expected finite weights: train or load them "
                "again",
            )


def batches_of(inputs: Any, most: int) -> list[Any]:
    """The inputs in batches of one length."""
    number = counted_inputs(inputs)
    # Of one length, so that each segment is compiled once.
    size = next(n for n in range(min(most, number), 0, -1) if number % n == 0)
    with as_inputs():
        batches = list(regroup(inputs, size))
    check_not_zero(batches)
    return batches
