"""The model of the loss: units that change no bit, and the limit of an update."""

import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.curvature.fisher import Surgeon
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.method import Found
from woodfisher_jax.curvature.sources import InMemory, laid_out
from woodfisher_jax.loss_model import (
    Model,
    Slope,
    in_units,
    moved,
    point_of,
    power_of_two,
    saliency,
    saliency_sum,
    without_units,
)
from woodfisher_jax.rows.compute import Compute

WEIGHTS = jnp.array([3.0, -0.5, 1.25, 0.0])
DIAGONAL = jnp.array([2.0, 0.5, 4.0, 1.0])
ACTIVE = jnp.array([True, True, True, False])


@pytest.mark.parametrize(
    ("number", "expected"),
    [(3.0, 2.0), (4.0, 4.0), (0.3, 0.25), (0.0, 1.0), (np.inf, 1.0), (np.nan, 1.0)],
)
def test_a_unit_is_the_power_of_two_below(number: float, expected: float) -> None:
    assert float(power_of_two(jnp.float32(number))) == expected


@pytest.mark.parametrize("scale", [1.0, 2.0**-70, 2.0**60])
def test_units_change_no_bit_of_a_saliency_and_keep_it_finite(scale: float) -> None:
    method, weights = wf.WoodFisher(), WEIGHTS * scale
    model = in_units(method, Model(diagonal=Found(DIAGONAL)), weights, ACTIVE)
    scores = saliency(method, model, weights, ACTIVE)
    assert 0.5 <= float(scores.max()) <= 4
    alone = saliency(method, Model(diagonal=Found(DIAGONAL)), WEIGHTS, ACTIVE)
    # Exact: both numbers are powers of two.
    unit = float(model.unit) * scale
    np.testing.assert_array_equal(scores / unit / unit, alone)
    if scale == 1:
        np.testing.assert_array_equal(without_units(scores, model.unit), alone)


def test_a_slope_moves_the_point_and_lowers_the_sum() -> None:
    slope = Slope(jnp.array([1.0, 0.0, 2.0, 0.0]), jnp.array([0.5, 0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(point_of(WEIGHTS, slope), WEIGHTS - slope.newton)
    newly = jnp.array([False, True, True, False])
    scores = jnp.array([8.0, 1.0, 2.0, 4.0])
    assert float(saliency_sum(scores, newly, None)) == 3
    assert float(saliency_sum(scores, newly, slope)) == 3 - (0.5 + 2) / 2


@pytest.mark.parametrize("update", ["sum", "joint"])
def test_an_update_is_scaled_and_then_no_longer_than_its_limit(update: str) -> None:
    gradients = jnp.array([[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    source = InMemory(*laid_out(gradients, None), 4, Compute())
    fisher = InverseFisher(source, 0.1, False)
    model = Model(fisher, fisher.diagonal())
    kept = jnp.array([True, False, True, False])

    def change(**options: float) -> np.ndarray:
        method = wf.WoodFisher(update=update, **options)
        assert isinstance(method, Surgeon)
        y, bounds = jnp.zeros(2), (0, 2, 4)
        return np.asarray(moved(method, model, WEIGHTS, ACTIVE, kept, y, bounds).value)

    whole = change()
    np.testing.assert_allclose(change(scale_update=0.5), whole / 2, rtol=1e-6)
    short = change(normalize_update=0.01)
    for part in (slice(2), slice(2, 4)):
        length = 0.01 * np.linalg.norm(WEIGHTS[part])
        assert np.linalg.norm(whole[part]) > length
        np.testing.assert_allclose(np.linalg.norm(short[part]), length, rtol=1e-5)
