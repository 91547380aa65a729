"""The quadratic model of the loss, and the statistic and the update by it.

Steps 3, 4 and 6 of a pruning step as pure functions. :func:`woodfisher_jax.step` calls
them inside one program; the driver calls :func:`model_of`, :func:`saliency` and
:func:`moved` by themselves where gradients are out of memory or something on the host
takes part.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from woodfisher_jax.curvature.fisher import Surgeon
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.method import Curvature, Found, Inverse, Joint, Method
from woodfisher_jax.equations import obs


class Slope(NamedTuple):
    """The first-order term of the loss.

    Attributes:
        mean: ḡ, [d].
        newton: h = F⁻¹ḡ, [d].
    """

    mean: jax.Array
    newton: jax.Array


class Model(NamedTuple):
    """The quadratic model of the loss around the weights, as a statistic takes it.

    Attributes:
        curvature: None for methods by magnitude.
        diagonal: Of the curvature; None where it has none or no weight is ranked.
        slope: In methods of first order.
        error: Largest relative error of a block; 0 where it was checked.
        unit: Power of two that weights are multiplied by to be ranked and moved, so
            that their squares stay within float32.
    """

    curvature: Curvature | None = None
    diagonal: Found | None = None
    slope: Slope | None = None
    error: jax.Array | float = 0.0
    unit: jax.Array | float = 1.0


def model_of(
    curvature: Curvature,
    diagonal: Found,
    mean: jax.Array | None = None,
    targets: jax.Array | None = None,
) -> Model:
    """The quadratic model with its diagonal and Newton step.

    Args:
        curvature: Of the weights.
        diagonal: Of the curvature.
        mean: ḡ, [d], in methods of first order; needs an inverse Fisher.
        targets: y, [N], where ``ḡ = -Gᵀy / N``; default: ḡ is of other samples.
    """
    if mean is None:
        return Model(curvature, diagonal, None, diagonal.error)
    assert isinstance(curvature, InverseFisher)
    if targets is None:
        newton = curvature.product(mean, diagonal.factors, rounded=True)
    else:
        newton = curvature.newton_step(targets, diagonal.factors)
    error = jnp.maximum(diagonal.error, newton.error)
    return Model(curvature, diagonal, Slope(mean, newton.value), error)


def in_units(
    method: Method, model: Model, weights: jax.Array, active: jax.Array
) -> Model:
    """The model in units of weight in which the largest saliency is about one.

    Args:
        method: Whose statistic; one that is not quadratic has no units.
        model: Of the loss around the weights.
        weights: w, [d].
        active: Weights that are not pruned [d], bool.
    """
    if not method.is_quadratic:
        return model
    sizes = jnp.where(active, jnp.abs(point_of(weights, model.slope)), 0.0)
    model = model._replace(unit=power_of_two(1 / jnp.max(sizes)))
    largest = jnp.max(jnp.abs(saliency(method, model, weights, active)))
    return model._replace(unit=model.unit * power_of_two(jax.lax.rsqrt(largest)))


def without_units(scores: jax.Array, unit: jax.Array | float) -> jax.Array:
    """A quadratic statistic in units of weight of one [d]."""
    for _ in range(2):
        # Else XLA multiplies the unit and the denominator of the statistic first, which
        # may leave float32.
        scores = jax.lax.optimization_barrier(scores) / unit
    return scores


def power_of_two(number: jax.Array) -> jax.Array:
    """The one below a positive number; 1 for what is not finite and positive."""
    number = number.astype(jnp.float32)
    # Its exponent alone: exp2 need not be exact.
    bits = jax.lax.bitcast_convert_type(number, jnp.int32)
    found = jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    return jnp.where(jnp.isfinite(number) & (found > 0), found, 1.0)


@partial(jax.jit, static_argnames="method")
def _saliency(
    method: Method,
    weights: jax.Array,
    slope: Slope | None,
    diagonal: jax.Array | None,
    active: jax.Array,
    unit: jax.Array | float,
) -> jax.Array:
    if diagonal is not None:
        # A pruned weight need not be in any block.
        diagonal = jnp.where(active, diagonal, 1.0)
    return method.saliency(unit * point_of(weights, slope), diagonal)


def saliency(
    method: Method, model: Model, weights: jax.Array, active: jax.Array
) -> jax.Array:
    """The statistic of every weight, in the units of the model [d].

    Args:
        method: Whose statistic.
        model: Of the loss around the weights.
        weights: w, [d].
        active: Weights that are not pruned [d], bool.
    """
    diagonal = None if model.diagonal is None else model.diagonal.value
    return _saliency(method, weights, model.slope, diagonal, active, model.unit)


@jax.jit
def saliency_sum(scores: jax.Array, newly: jax.Array, slope: Slope | None) -> jax.Array:
    """Loss increase if each of the newly pruned weights were removed alone."""
    total = jnp.sum(jnp.where(newly, scores, 0.0))
    # ḡᵀF⁻¹ḡ is one number for all weights; it ranks none.
    return total if slope is None else total - jnp.dot(slope.mean, slope.newton) / 2


def point_of(weights: jax.Array, slope: Slope | None) -> jax.Array:
    """Where statistic and update are taken: w, or w - h with a slope [d]."""
    return weights if slope is None else weights - slope.newton


def moved(
    method: Method,
    model: Model,
    weights: jax.Array,
    active: jax.Array,
    kept: jax.Array,
    targets: jax.Array,
    bounds: tuple[int, ...],
) -> Found:
    """δw of the weights that stay, scaled and limited [d].

    Args:
        method: Whose update.
        model: Of the loss around the weights.
        weights: w, [d].
        active: Weights that were not pruned before [d], bool.
        kept: Weights that stay [d], bool.
        targets: y, [N], of the slope; zero without one.
        bounds: Where tensors start, for the limit of the norm, and last d.
    """
    if not isinstance(method, Surgeon) or not method.moves:
        return Found(jnp.zeros_like(weights))
    curvature = model.curvature
    if method.update == "joint":
        assert isinstance(curvature, Joint)
        found = curvature.joint_update(weights, kept, targets)
        found = found._replace(value=jnp.where(kept, found.value, 0.0))
    else:
        assert isinstance(curvature, Inverse)
        assert model.diagonal is not None
        newly = active & ~kept
        b = _direction(weights, model.slope, model.diagonal.value, newly, model.unit)
        found = curvature.product(b, model.diagonal.factors)
        value = found.value / model.unit
        if model.slope is not None:
            value = value - model.slope.newton
        found = found._replace(value=value)
    change = method.scale_update * found.value
    if method.normalize_update is not None:
        # In units, for a norm is a root of squares.
        most, unit = method.normalize_update, model.unit
        change = _shortened(unit * change, unit * weights, bounds, most) / unit
    return found._replace(value=change)


@jax.jit
def _direction(
    weights: jax.Array,
    slope: Slope | None,
    diagonal: jax.Array,
    newly: jax.Array,
    unit: jax.Array | float,
) -> jax.Array:
    """B with ``δw = F⁻¹b``, the sum of single-weight updates, in units of weight."""
    return obs.obs_direction(unit * point_of(weights, slope), diagonal, newly)


@partial(jax.jit, static_argnames=("bounds", "most"))
def _shortened(
    update: jax.Array, weights: jax.Array, bounds: tuple[int, ...], most: float
) -> jax.Array:
    """Shortens the update of each range to ``most`` times the norm of its weights."""
    parts = []
    for start, stop in pairwise(bounds):
        part, limit = update[start:stop], most * jnp.linalg.norm(weights[start:stop])
        length = jnp.linalg.norm(part)
        parts.append(jnp.where(length > limit, part * (limit / length), part))
    return jnp.concatenate(parts)
