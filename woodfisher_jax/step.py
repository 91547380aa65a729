"""One pruning step on checked arguments: curvature, statistic, masks, update."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.operators import (
    BUILDERS,
    GroupOperator,
    Operator,
    Problem,
    RowOperator,
    mean_of_others,
    moments_of,
)
from woodfisher_jax.equations.damping import ChosenDamping
from woodfisher_jax.equations.swaps import Support, improve
from woodfisher_jax.info import Clock, PruneInfo
from woodfisher_jax.rows.gradients import LossFn, as_partial
from woodfisher_jax.rows.inputs import check_loss
from woodfisher_jax.rows.moments import Moments
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.selection import scope as selection
from woodfisher_jax.selection.diagnostics import (
    magnitude_overlap,
    rank_correlation,
    saliency_histogram,
)
from woodfisher_jax.selection.patterns import Groups, groups_of
from woodfisher_jax.settings import Settings
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees import masks as masks_
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params
from woodfisher_jax.trees.vectors import (
    check_finite,
    check_weights,
    from_vectors,
    to_vectors,
)


class Examples(NamedTuple):
    """Samples of one step, checked and counted.

    Attributes:
        curvature: For the curvature, or a single one to count MACs with; None where
            neither is needed.
        mean: For the mean gradient alone, or None.
        targets: By which the rows are to change [N], or on average [], or None.
    """

    curvature: Any
    mean: Any
    targets: jax.Array | None = None


class _Slope(NamedTuple):
    """The first-order term of the loss.

    Attributes:
        mean: ḡ, [d].
        newton: h = F⁻¹ḡ, [d].
    """

    mean: jax.Array
    newton: jax.Array


class _Model(NamedTuple):
    """The quadratic model of the loss around the weights.

    Attributes:
        operator: The curvature, entered.
        diagonal: Of the operator [d]; None where no weight goes.
        slope: For methods of first order, where weights are ranked.
        asked: y, of ``ḡ = -Gᵀy / N``: what the rows are to change by, [N]; zero without
            a slope.
        moments: Of the gradients, for diagnostics.
        dampings: Chosen on the way; more are added.
        needs: What the curvature was planned to take.
    """

    operator: Operator
    diagonal: jax.Array | None
    slope: _Slope | None
    asked: jax.Array
    moments: Moments | None
    dampings: list[ChosenDamping]
    needs: Needs | None


def prune_step(
    loss_fn: LossFn | None,
    params: Params,
    masks: Masks,
    samples: Examples,
    order: blocks.FlatOrder,
    settings: Settings,
) -> tuple[Params, Masks, PruneInfo]:
    """Steps 1 to 6; see :func:`woodfisher_jax.prune`.

    Args:
        loss_fn: (params, batch) -> mean loss; None for methods by magnitude.
        params: Any pytree.
        masks: In the tree's order.
        samples: Counted.
        order: The flat order of the masks.
        settings: Checked, N included.
    """
    groups = groups_of(settings.pattern, order) if settings.pattern else None
    if settings.sparsity is not None and not settings.completes_pattern:
        selection.num_kept(masks, order, settings)  # refuses before work starts
    costs = selection.count_costs(loss_fn, params, masks, samples.curvature, settings)
    repairs = selection.nothing_goes(masks, order, settings)
    row, clock = settings.method, Clock()
    params, masks = replicate((params, masks), settings.mesh)
    params, weights, active = to_vectors(params, masks, order)
    check_weights(params)
    with ExitStack() as stack:
        # 1 to 3: gradients, laid out by block as they arrive; curvature.
        model = None
        if row.curvature is not None:
            loss_fn = check_loss(loss_fn, params, samples.curvature)
            loss = replicate(as_partial(loss_fn), settings.mesh)
            problem = Problem(loss, params, masks, *samples, order, settings)
            model = _model(problem, weights, active, repairs, stack, clock)
        else:
            clock.mark(0.0)

        # 4 and 5: statistic, masks.
        scores, kept, swaps = None, active, None
        if not repairs:
            scores, kept = _ranked(
                model, weights, active, masks, groups, costs, order, settings
            )
        if model and settings.swaps:
            swaps = _swapped(model, weights, active, kept, settings)
            kept = swaps.kept
        clock.mark(_forming(model))

        # 6: the others make up for the newly pruned.
        moved = weights
        if model and row.direction and settings.scale_update != 0:
            update = UPDATES[settings.update]
            change = update(model, weights, active, kept, settings)
            moved = weights + _scaled(change, weights, order, settings)
            check_finite(moved, order, "the updated weights of", "the update")
        found: dict[str, Any] = {
            "macs": selection.macs_of(kept, order, costs, settings)
        }
        if scores is not None:
            found["saliency_histogram"] = saliency_histogram(
                *(np.asarray(array) for array in (scores, active, kept))
            )
        if model:
            found |= _told(model, scores, active & ~kept)
        if swaps:
            found["swap_losses"] = swaps.losses
        if settings.diagnostics and scores is not None:
            found |= _compared(weights, active, kept, scores)
            found |= _predicted(jnp.where(kept, moved, 0.0) - weights, model, order)
    new_params, new_masks = from_vectors(params, moved, kept, order)
    new_masks = {path: new_masks[path] for path in order.paths}  # jit sorts dicts
    jax.block_until_ready(new_params)
    clock.mark(_forming(model))
    return new_params, new_masks, _info(new_masks, settings, clock, found)


def _model(
    problem: Problem,
    weights: jax.Array,
    active: jax.Array,
    repairs: bool,
    stack: ExitStack,
    clock: Clock,
) -> _Model:
    """Builds the operator; takes its diagonal, and the slope where it is asked for.

    Neither where the step only repairs, which needs no ranks. The operator is closed
    with the stack; the clock is marked where gradients end.
    """
    settings = problem.settings
    first_order = settings.method.first_order
    number, targets = settings.num_samples, problem.targets
    needs_mean = first_order and problem.mean_samples is None and targets is None
    built = BUILDERS[settings.method.curvature or ""](
        problem, needs_mean or settings.diagnostics
    )
    operator = stack.enter_context(built.operator)
    clock.mark(operator.seconds_gradients)
    asked = jnp.zeros(number, jnp.float32)
    if first_order:
        asked = jnp.broadcast_to(-1.0 if targets is None else targets, (number,))
    dampings = []
    if settings.damping is None:
        rows = cast(RowOperator, operator)
        missing = _smallest(weights, active, settings)
        if not jnp.any(missing) and not jnp.any(asked):
            missing = weights
        dampings.append(rows.choose_damping(active, missing, asked))
    if repairs:
        return _Model(operator, None, None, asked, built.moments, dampings, built.needs)
    diagonal = operator.diagonal()
    moments = built.moments
    if moments is None and settings.diagnostics:
        moments = moments_of(problem)
    slope = None
    if first_order:
        if targets is None:
            mean = _mean_gradient(problem, moments)
        else:
            mean = cast(RowOperator, operator).slope(asked)
        slope = _Slope(mean, operator.product(mean))
    return _Model(operator, diagonal, slope, asked, moments, dampings, built.needs)


def _ranked(
    model: _Model | None,
    weights: jax.Array,
    active: jax.Array,
    masks: Masks,
    groups: Groups | None,
    costs: selection.Costs | None,
    order: blocks.FlatOrder,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Scores, and the mask that follows from them, [d] each."""
    point = weights - model.slope.newton if model and model.slope else weights
    diagonal = model.diagonal if model else None
    scores = selection.saliency(point, diagonal, active, settings.method.statistic)
    check_finite(scores, order, "the saliency of", "its weights or its curvature")
    if groups is not None:
        return _by_groups(
            model, point, scores, active, masks, groups, costs, order, settings
        )
    return scores, selection.choose(scores, active, masks, order, costs, settings)


def _by_groups(
    model: _Model | None,
    point: jax.Array,
    scores: jax.Array,
    active: jax.Array,
    masks: Masks,
    groups: Groups,
    costs: selection.Costs | None,
    order: blocks.FlatOrder,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Scores and mask of a pattern, [d] each.

    By magnitude a group is worth the sum of its squares, by Optimal Brain Damage that
    of its saliencies, by Optimal Brain Surgeon its joint saliency.
    """
    if model is None:
        scores = scores * scores
    if model is not None and settings.method.direction is not None:
        operator = cast(GroupOperator, model.operator)
        values: Any = operator.group_saliency(jnp.where(active, point, 0.0), groups)
    else:
        values = selection.sums_of_single(scores, groups)
    if groups.removals is not None:
        goal = None
        if not settings.completes_pattern:
            goal = selection.num_kept(masks, order, settings)
        kept, scores = selection.choose_of_each(values, scores, active, groups, goal)
    else:
        scores = selection.shared(values, active, groups)
        kept = selection.choose(scores, active, masks, order, costs, settings, groups)
    return scores, kept


def _swapped(
    model: _Model,
    weights: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    settings: Settings,
) -> Support:
    """A better support for the joint update."""
    rows = cast(RowOperator, model.operator)
    slope = model.slope.mean if model.slope else jnp.zeros_like(weights)
    return improve(rows, weights, active, kept, model.asked, slope, settings.swaps)


def _smallest(weights: jax.Array, active: jax.Array, settings: Settings) -> jax.Array:
    """The weights that global magnitude would take: a guess at what will go [d].

    All of them where the goal is no sparsity.
    """
    goal = settings.sparsity
    left = 0 if goal is None else masks_.num_kept(len(weights), goal)
    stays = masks_.keep_highest(jnp.abs(weights), active, jnp.asarray(left))
    return jnp.where(stays, 0.0, weights)


def _mean_gradient(problem: Problem, moments: Moments | None) -> jax.Array:
    """ḡ of other samples, or of the Fisher's own [d]."""
    own = moments if problem.mean_samples is None else mean_of_others(problem)
    assert own is not None
    return own.vector(problem.order)


def _forming(model: _Model | None) -> float:
    return model.operator.seconds_gradients if model else 0.0


def _info(
    masks: Masks, settings: Settings, clock: Clock, found: dict[str, Any]
) -> PruneInfo:
    nonzero, prunable = masks_.count(masks)
    gradients, curvature, update = clock.phases()
    return PruneInfo(
        sparsity=(prunable - nonzero) / prunable,
        nonzero=nonzero,
        prunable=prunable,
        sparsity_by_path=masks_.sparsity_by_path(masks),
        num_samples=settings.num_samples,
        seconds_gradients=gradients,
        seconds_curvature=curvature,
        seconds_update=update,
    )._replace(**found)


# -------------------------------------------------------------------------- the update


@partial(jax.jit, static_argnames="direction")
def _direction(
    point: jax.Array,
    diagonal: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    direction: Callable[..., jax.Array],
) -> jax.Array:
    """The vector b of the update [d]."""
    return direction(point, diagonal, active & ~kept)


def _sum_of_single(
    model: _Model,
    weights: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    settings: Settings,
) -> jax.Array:
    """``δw = F⁻¹b - h``, the sum of single-weight updates [d]."""
    slope, direction = model.slope, settings.method.direction
    assert direction is not None
    assert model.diagonal is not None
    point = weights if slope is None else weights - slope.newton
    vector = _direction(point, model.diagonal, active, kept, direction)
    if slope is not None:
        vector = vector - slope.mean  # h is F⁻¹ḡ: one product for both.
    return model.operator.product(vector)


def _joint(
    model: _Model,
    weights: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    settings: Settings,
) -> jax.Array:
    """The minimum with all that goes taken together; zero for what goes [d]."""
    del active
    operator = cast(RowOperator, model.operator)
    gone = jnp.where(kept, 0.0, weights)
    if settings.damping is None and model.diagonal is None:
        model.dampings.append(model.dampings[0])  # chosen on the same weights
    elif settings.damping is None and (jnp.any(gone) or jnp.any(model.asked)):
        # Less damping than chose the mask would be a step beyond where the model holds.
        least = model.dampings[0].multiple
        model.dampings.append(operator.choose_damping(kept, gone, model.asked, least))
    return jnp.where(kept, operator.joint_update(weights, kept, model.asked), 0.0)


UPDATES: dict[str, Callable[..., jax.Array]] = {
    "sum": _sum_of_single,
    "joint": _joint,
}
"""For each of the updates that move anything, what finds it."""


def _scaled(
    change: jax.Array, weights: jax.Array, order: blocks.FlatOrder, settings: Settings
) -> jax.Array:
    """The update, scaled and no longer than it may be [d]."""
    change = settings.scale_update * change
    if settings.normalize_update is None:
        return change
    return _shortened(change, weights, order, settings.normalize_update)


@partial(jax.jit, static_argnames=("order", "most"))
def _shortened(
    update: jax.Array, weights: jax.Array, order: blocks.FlatOrder, most: float
) -> jax.Array:
    """Shortens the update of each tensor to ``most`` times the norm of its weights."""
    sizes = blocks.unflatten(order, weights)
    short = {}
    for path, part in blocks.unflatten(order, update).items():
        limit = most * jnp.linalg.norm(sizes[path])
        length = jnp.linalg.norm(part)
        short[path] = jnp.where(length > limit, part * (limit / length), part)
    return blocks.flatten(order, short)


# --------------------------------------------------------------------- what was done


@jax.jit
def _saliency_sum(
    scores: jax.Array, gone: jax.Array, slope: _Slope | None
) -> jax.Array:
    total = jnp.sum(jnp.where(gone, scores, 0.0))
    # γ = ḡᵀF⁻¹ḡ is one number for all weights; it does not rank them.
    return total if slope is None else total - jnp.dot(slope.mean, slope.newton) / 2


def _told(model: _Model, scores: jax.Array | None, gone: jax.Array) -> dict[str, Any]:
    """What is known of every step with a curvature."""
    found: dict[str, Any] = {"needs": model.needs}
    if scores is not None:
        found["saliency_sum"] = float(_saliency_sum(scores, gone, model.slope))
    if model.dampings:
        found["dampings"] = tuple(model.dampings)
    return found


def _compared(
    weights: jax.Array, active: jax.Array, kept: jax.Array, scores: jax.Array
) -> dict[str, float | None]:
    """The mask and the statistic beside those of global magnitude."""
    flat = [np.asarray(array) for array in (weights, active, kept, scores)]
    sizes, may_go, stays, worth = flat
    return {
        "magnitude_overlap": magnitude_overlap(sizes, may_go, stays),
        "magnitude_correlation": rank_correlation(worth[may_go], np.abs(sizes[may_go])),
    }


def _predicted(
    step: jax.Array, model: _Model | None, order: blocks.FlatOrder
) -> dict[str, Any]:
    """The quadratic model of the loss for the step that was taken."""
    if model is None or model.moments is None:
        return {}
    trace = model.moments.trace
    mean = model.slope.mean if model.slope else model.moments.vector(order)
    linear = float(jnp.dot(mean, step))
    return {
        "gradient_term": linear,
        "predicted_loss_increase": linear + model.operator.quadratic_form(step) / 2,
        "fisher_trace": {path: trace[path] for path in order.paths},
    }
