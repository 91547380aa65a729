"""Structures pruned so that the network's outputs stay, from inputs alone."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from woodfisher_jax.info import PruneInfo, joined
from woodfisher_jax.options import OptionError
from woodfisher_jax.prune import prune
from woodfisher_jax.rows.compute import watched
from woodfisher_jax.selection.patterns import Pattern, parse
from woodfisher_jax.selection.structures import (
    COSTS,
    KINDS,
    Budget,
    Structures,
    structures,
)
from woodfisher_jax.stages.matching import OutputsFn, Stage, matching_rows
from woodfisher_jax.stages.outputs import dense_outputs, draws
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.trees.masks import Masks, Prunable, init_masks
from woodfisher_jax.trees.masks import sparsity as sparsity_of
from woodfisher_jax.trees.paths import Params


@watched
def prune_structures(
    net_fn: OutputsFn,
    params: Params,
    inputs: Any,
    *,
    macs: float | None = None,
    size: float | None = None,
    kinds: Iterable[str] = KINDS,
    stages: int = 12,
    repairs: int = 4,
    num_samples: int = 1000,
    masks: Masks | None = None,
    prunable: Prunable = None,
    metric: str = "identity",
    seed: int = 0,
    after: Callable[[Params], Params] | None = None,
    **options: Any,
) -> tuple[Params, Masks, PruneInfo]:
    """Prunes channels, neurons and heads until the network costs no more than asked.

    In each stage those structures go that raise ``E ‖f(w, x) - f(w₀, x)‖²`` least for
    what they save, by their joint saliency, and all other weights are moved so that it
    stays low. :func:`woodfisher_jax.shrink` then takes them out.

    Args:
        net_fn: (params, inputs) -> outputs [n, k], such as logits, in evaluation mode.
        params: w₀, any pytree of floating-point arrays, best with the statistics of
            batch norms in it.
        inputs: x, one batch: a pytree of arrays with a leading axis of examples.
        macs: Share of the multiply-accumulates to be left, in (0, 1].
        size: Share of the parameters to be left, in (0, 1]; one of both or both.
        kinds: Of structures that may go, some of "channels", "neurons" and "heads".
        stages: Default 12, each of which leaves the same share.
        repairs: Stages that follow and prune nothing; default 4.
        num_samples: Inputs of each stage; default 1000, or all there are.
        masks: As for :func:`woodfisher_jax.prune`; what they have pruned stays so.
        prunable: As for :func:`woodfisher_jax.prune`. All these tensors are moved.
        metric: "identity", or "softmax" for logits; default "identity".
        seed: Of the drawn inputs and of the random projections of the outputs.
        after: params -> params after each stage, such as statistics of batch norms
            estimated again (:func:`woodfisher_jax.batch_norm.reestimate`).
        **options: As for :func:`woodfisher_jax.prune`; defaults are
            method="woodtaylor", update="joint" and damping="auto".

    Returns:
        ``(params, masks, info)``: the weights that make and read what went are zero.

    Raises:
        OptionError: If an argument is out of range, or structures cannot meet it.

    Example:
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["c"]
        >>> x = jax.random.normal(jax.random.key(0), (50, 3))
        >>> a, c = jax.random.normal(jax.random.key(1), (2, 3, 3))
        >>> dense = {"a": a, "c": c.at[1].set(1e-3)}
        >>> params, masks, _ = wf.prune_structures(net, dense, x, macs=0.7, stages=1)
        >>> masks["c"].all(axis=1).tolist()
        [True, False, True]
        >>> wf.shrink(net, params, masks, x)["a"].shape
        (3, 2)
    """
    shares = {"macs": macs, "size": size}
    wanted, images = dense_outputs(net_fn, params, inputs)
    few = jax.tree.map(lambda a: a[:1], images)
    found = structures(net_fn, params, few).of(_kinds(kinds))
    if not found.families:
        raise OptionError(
            "net_fn",
            "net_fn has no structures that can be taken out: "
            + "; ".join(f"{w.path} axis {w.axis} {w.reason}" for w in found.whole[:3]),
        )
    goal = _goal(found, shares)
    axes = find_axes(net_fn, params, few)
    masks = init_masks(params, prunable, axes) if masks is None else masks
    rule = parse("structures")
    assert rule is not None
    start = found.account(found.gone(masks)).left
    drawn, key, infos = draws(len(wanted), num_samples, seed), jax.random.key(seed), []
    given = {"method": "woodtaylor", "update": "joint", "damping": "auto", **options}
    progress = given["progress"]
    for number in range(stages + repairs):
        progress("stages", number, stages + repairs)
        chosen = drawn(number)
        some = jax.tree.map(lambda a, chosen=chosen: a[chosen], images)
        rows = matching_rows(
            Stage(net_fn, some, wanted[chosen]),
            params,
            jax.random.fold_in(key, number),
            metric,
        )
        way = min(1.0, (number + 1) / stages)
        budget = {n: start[n] * (goal[n] / start[n]) ** way for n in goal}
        params, masks, info = prune(
            rows.loss_fn,
            params,
            rows.samples,
            targets=rows.targets,
            masks=masks,
            axes=axes,
            **given,
            **_next(number < stages, rule, found, budget, masks),
        )
        infos.append(info)
        params = params if after is None else after(params)
    progress("stages", stages + repairs, stages + repairs)
    return params, masks, joined(infos)


def _next(
    prunes: bool, rule: Pattern, found: Structures, budget: Budget, masks: Masks
) -> dict[str, Any]:
    """What a stage is to reach: a budget, or what there is."""
    if prunes:
        return {"pattern": rule._replace(structures=found, budget=budget)}
    return {"sparsity": sparsity_of(masks), "scope": "global"}


def _kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not chosen or set(chosen) - set(KINDS):
        raise OptionError("kinds", f"kinds={kinds!r}; expected some of {KINDS}")
    return chosen


def _goal(found: Structures, shares: dict[str, float | None]) -> dict[str, float]:
    """What may be left of each cost that has a share."""
    given = {name: share for name, share in shares.items() if share is not None}
    whole = {"size": found.size, "macs": found.macs}
    for name, share in given.items():
        if isinstance(share, bool) or not 0 < share <= 1:
            raise OptionError(
                name,
                f"{name}={share!r}; expected the share of the {COSTS[name]} to be "
                "left, above 0 and at most 1, such as 0.5",
            )
    if not given:
        raise OptionError(
            "macs",
            "macs and size are missing; expected one of them or both, such as macs=0.5 "
            "for half the multiply-accumulates",
        )
    return {name: share * whole[name] for name, share in given.items()}
