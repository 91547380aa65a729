"""A pruning step as pure functions of gradients, weights and masks.

:func:`step` is the whole of it for gradients that fit in memory: one program, for use
in a caller's own ``jit`` and ``vmap``. The driver in :mod:`woodfisher_jax.prune` calls
its programs, :func:`resident_step` and two more, where it can.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.curvature.inverse import Grams, InverseFisher
from woodfisher_jax.curvature.method import Found
from woodfisher_jax.curvature.sources import InMemory, laid_out
from woodfisher_jax.equations.damping import LeaveOneOut
from woodfisher_jax.loss_model import (
    Model,
    in_units,
    model_of,
    moved,
    power_of_two,
    saliency,
    saliency_sum,
    without_units,
)
from woodfisher_jax.methods import method_named
from woodfisher_jax.options import OptionError, check_fraction
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import SCOPES
from woodfisher_jax.selection.scope import keep
from woodfisher_jax.trees.blocks import Layout, full_matrix
from woodfisher_jax.trees.masks import num_kept, traced_num_kept


class Step(NamedTuple):
    """What a step leaves.

    Attributes:
        weights: [d], float32; zero where pruned.
        mask: What stays [d], bool.
        scores: The statistic, by which the mask was chosen [d].
        saliency_sum: Of the pruned weights, less ``ḡᵀh / 2`` with a slope: the loss
            increase if each were removed alone.
        error: Largest relative error of a block. Above
            :data:`~woodfisher_jax.curvature.checked.TOLERANCE` the result is not to be
            trusted: a Fisher is too ill conditioned, and the damping should be larger.
        touched: Weights with a gradient in some sample [d], bool. The others are ranked
            as if the loss did not depend on them.
    """

    weights: jax.Array
    mask: jax.Array
    scores: jax.Array
    saliency_sum: jax.Array
    error: jax.Array
    touched: jax.Array


def step(
    gradients: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    sparsity: jax.Array | float,
    *,
    method: WoodFisher | str = "woodfisher",
    damping: jax.Array | float | None = None,
    layout: Layout | None = None,
    targets: jax.Array | float = -1.0,
    bounds: tuple[int, ...] | None = None,
    scope: str = "global",
    solver: str = "auto",
) -> Step:
    """One pruning step, pure: statistic, mask and update from gradients in memory.

    1. diag(F⁻¹) with ``F = λ I + GᵀG / N`` of each block,
    2. saliency ``ρ_q = w_q² / (2 [F⁻¹]_qq)``, at w - F⁻¹ḡ in methods of first order,
    3. the mask of the highest saliencies, nested in the one there is,
    4. the update of the other weights: ``F⁻¹b`` with ``b_q = -w_q / [F⁻¹]_qq``, or the
       joint one.

    It does no input and output and raises nothing about numbers; look at ``error``.

    Args:
        gradients: G, [N, d], from :func:`~woodfisher_jax.rows.gradients.gradient_rows`.
        weights: w, [d], float32.
        mask: What is not pruned yet [d], bool.
        sparsity: Of all d weights (or of each tensor) afterwards; may be traced, and
            then counts to six decimals.
        method: With its options; a name of METHODS or a
            :class:`~woodfisher_jax.curvature.fisher.WoodFisher`. Static.
        damping: λ > 0, weight decay included; default the method's.
        layout: Index arrays [num_blocks, width] into the d weights; default one block
            of all of them.
        targets: For methods of first order y, [N] or one number, with
            ``ḡ = -Gᵀy / N``; default -1, the mean gradient.
        bounds: Where the tensors start in the vector, and last d; default one tensor.
            Static.
        scope: "global" for one threshold, "layer" for one a tensor. Static.
        solver: As in :class:`~woodfisher_jax.rows.compute.Compute`. Static.

    Returns:
        A :class:`Step`.

    Example:
        >>> G = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> w, mask = jnp.array([1.0, 1.0, 3.0]), jnp.ones(3, bool)
        >>> found = wf.step(G, w, mask, 1 / 3, damping=1.0)
        >>> found.mask.tolist(), found.weights.tolist()
        ([False, True, True], [0.0, 1.0, 3.0])
    """
    row, size = method_named(method), weights.shape[0]
    if (
        not isinstance(row, WoodFisher)
        or row.swaps
        or not isinstance(row.damping, float)
    ):
        raise OptionError(
            "method",
            f"method={method!r}: step takes a WoodFisher with a number for its damping "
            "and without swaps; for other methods call wf.prune",
        )
    _check_step(gradients, weights, mask, row, layout, bounds, scope)
    if not isinstance(sparsity, jax.Array):
        check_fraction("sparsity", sparsity)
    bounds = (0, size) if bounds is None else bounds
    ranges = bounds if scope == "layer" else (0, size)
    kept = tuple(_left(stop - start, sparsity) for start, stop in pairwise(ranges))
    rows, index, tiles = laid_out(gradients, layout)
    source = InMemory(rows, index, tiles, size, Compute(solver=solver))
    strength = row.strength if damping is None else damping
    y = jnp.broadcast_to(jnp.asarray(targets, jnp.float32), (len(rows),))
    return resident_step(
        source,
        weights,
        mask,
        kept,
        strength,
        y,
        method=undamped(row),
        bounds=bounds,
        ranges=ranges,
    )


def _check_step(
    gradients: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    method: WoodFisher,
    layout: Layout | None,
    bounds: tuple[int, ...] | None,
    scope: str,
) -> None:
    """Raises unless the shapes and static arguments of a step fit one another."""
    size = weights.shape[0]
    shapes = gradients.shape[1:], weights.shape, mask.shape
    if gradients.ndim != 2 or not len(gradients) or set(shapes) != {(size,)}:
        raise OptionError(
            "gradients",
            f"gradients of shape {gradients.shape}, weights {weights.shape} and mask "
            f"{mask.shape}; expected [N, d], [d] and [d]",
        )
    if layout is None and (method.block_size or method.layout is not full_matrix):
        raise OptionError(
            "layout",
            "layout=None with a method whose blocks are smaller than all weights; "
            "expected index arrays, such as wf.blocks.within_tensors(order, 2000)",
        )
    if scope not in SCOPES or (scope == "layer" and bounds is None):
        raise OptionError(
            "scope",
            f"scope={scope!r} with bounds={bounds}; expected 'global', or 'layer' with "
            "bounds=order.offsets",
        )
    if bounds is not None and (bounds[0], bounds[-1]) != (0, size):
        raise OptionError(
            "bounds", f"bounds={bounds}; expected a tuple from 0 to d={size}"
        )


def _left(size: int, sparsity: jax.Array | float) -> jax.Array | int:
    """How many of so many weights stay."""
    if isinstance(sparsity, (int, float)):
        return num_kept(size, sparsity)
    return traced_num_kept(size, sparsity)


@partial(jax.jit, static_argnames=("method", "bounds", "ranges"))
def resident_step(
    source: InMemory,
    weights: jax.Array,
    mask: jax.Array,
    kept: tuple[jax.Array | int, ...],
    damping: jax.Array | float,
    targets: jax.Array | np.ndarray,
    grams: Grams | None = None,
    *,
    method: WoodFisher,
    bounds: tuple[int, ...],
    ranges: tuple[int, ...],
) -> Step:
    """:func:`step` of gradients that are laid out by block already, as one program.

    Args:
        source: The gradients.
        weights: w, [d], float32.
        mask: What is not pruned yet [d], bool.
        kept: How many weights stay in each range.
        damping: λ > 0; that of ``method`` is not read, so that another value does not
            compile again.
        targets: y, [N].
        grams: Of :func:`resident_damping` over ``mask``; default None.
        method: From :func:`undamped`.
        bounds: Where the tensors start, and last d.
        ranges: Where the ranges start that have a threshold, and last d.
    """
    fisher = _resident_fisher(source, damping, grams, method)
    weights, targets = jnp.where(mask, weights, 0.0), jnp.asarray(targets)
    diagonal = fisher.factored().diagonal()
    assert diagonal.touched is not None
    mean = fisher.slope(targets) if method.first_order else None
    model = in_units(method, model_of(fisher, diagonal, mean, targets), weights, mask)
    ranking = saliency(method, model, weights, mask)
    new = keep(ranking, mask, kept, ranges, bounds)
    scores = without_units(ranking, model.unit)
    y = targets if method.first_order else jnp.zeros_like(targets)
    change = moved(method, model, weights, mask, new, y, bounds)
    return Step(
        weights=jnp.where(new, weights + change.value, 0.0),
        mask=new,
        scores=scores,
        saliency_sum=saliency_sum(scores, mask & ~new, model.slope),
        error=jnp.maximum(model.error, change.error),
        touched=diagonal.touched,
    )


@partial(jax.jit, static_argnames="method")
def resident_damping(
    source: InMemory,
    support: jax.Array,
    missing: jax.Array | np.ndarray,
    targets: jax.Array | np.ndarray,
    *,
    method: WoodFisher,
) -> tuple[Grams | None, LeaveOneOut]:
    """What the damping of a step is chosen by, as one program.

    Args:
        source: The gradients.
        support: As for :meth:`InverseFisher.leave_one_out`, as the next two.
        missing: v, [d].
        targets: y, [N].
        method: From :func:`undamped`.

    Returns:
        ``grams`` over the support, where the other programs can start from them; the
        errors.
    """
    fisher = InverseFisher(source, jnp.nan, method.centered)
    return fisher.leave_one_out(support, jnp.asarray(missing), jnp.asarray(targets))


@partial(jax.jit, static_argnames=("method", "bounds"))
def resident_update(
    source: InMemory,
    weights: jax.Array,
    kept: jax.Array,
    damping: jax.Array | float,
    targets: jax.Array | np.ndarray,
    grams: Grams | None = None,
    *,
    method: WoodFisher,
    bounds: tuple[int, ...],
) -> Found:
    """The joint update for a mask that is known, as one program.

    Args:
        source: The gradients.
        weights: w, [d], zero where pruned before.
        kept: What stays [d], bool.
        damping: λ > 0.
        targets: y, [N]; zero without a slope.
        grams: Of :func:`resident_damping` over ``kept``; default None.
        method: From :func:`undamped`.
        bounds: Where the tensors start, and last d.

    Returns:
        w + δw, zero where pruned, and the largest relative error of a block.
    """
    fisher = _resident_fisher(source, damping, grams, method)
    model = Model(fisher, unit=power_of_two(1 / jnp.max(jnp.abs(weights))))
    change = moved(method, model, weights, kept, kept, jnp.asarray(targets), bounds)
    return change._replace(value=jnp.where(kept, weights + change.value, 0.0))


def _resident_fisher(
    source: InMemory,
    damping: jax.Array | float,
    grams: Grams | None,
    method: WoodFisher,
) -> InverseFisher:
    fisher = InverseFisher(source, damping, method.centered, grams=grams)
    return fisher if grams is None else fisher.with_damping(damping)


def undamped(method: WoodFisher) -> WoodFisher:
    """The method as a static argument of a program that takes λ beside it."""
    return method.replace(damping=1.0, weight_decay=0.0)
