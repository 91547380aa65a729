"""The statistic of groups against explicit inverses in float64."""

from itertools import combinations

import jax
import numpy as np
import pytest

from woodfisher_jax.equations.groups import group_forms
from woodfisher_jax.equations.joint import joint_update
from woodfisher_jax.equations.obs import obs_saliency

# Otherwise every operation is compiled on its own.
forms = jax.jit(group_forms, static_argnames="solver")

WIDTH = 40
DAMPING = 0.05


def problem(num_samples, seed=0, scale=1.0):
    """Gradients of weights that explain one another, and weights, in float64."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(num_samples, WIDTH)) * scale
    gradients[:, WIDTH // 2 :] += gradients[:, : WIDTH // 2]
    return gradients, rng.normal(size=WIDTH)


def fisher(gradients, damping=DAMPING):
    number, width = gradients.shape
    return damping * np.eye(width) + gradients.T @ gradients / number


def oracle(gradients, weights, group, damping=DAMPING):
    inverse = np.linalg.inv(fisher(gradients, damping))
    part = weights[group]
    return part @ np.linalg.solve(inverse[np.ix_(group, group)], part) / 2


def tables(sizes):
    """Groups of consecutive columns, and one of nothing but padding, for each size."""
    found = []
    for size in sizes:
        table = np.arange(WIDTH, dtype=np.int32).reshape(-1, size)
        found.append(np.pad(table, [(0, 1), (0, 0)], constant_values=WIDTH))
    return found


def single(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


@pytest.mark.parametrize(
    ("solver", "num_samples", "sizes"),
    [
        ("sample_space", 18, (1, 40)),
        # By elimination, by Cholesky, and with more weights than samples.
        pytest.param("sample_space", 18, (4, 20, 40), marks=pytest.mark.slow),
        pytest.param("dense", 50, (20,), marks=pytest.mark.slow),
        pytest.param("recursion", 6, (4,), marks=pytest.mark.slow),
    ],
)
def test_groups_have_the_saliency_of_the_explicit_inverse(
    solver, num_samples, sizes
) -> None:
    gradients, weights = problem(num_samples)
    values = forms(
        *single(gradients, weights), tables(sizes), np.float32(DAMPING), solver=solver
    )
    for table, found in zip(tables(sizes), values, strict=True):
        expected = [oracle(gradients, weights, group) for group in table[:-1]]
        np.testing.assert_allclose(found[:-1, 0], expected, rtol=1e-5)
        assert found[-1] == 0
    if 1 in sizes:  # groups of one weight, and of all, which leave none to adjust
        single_ones = obs_saliency(weights, np.diag(np.linalg.inv(fisher(gradients))))
        np.testing.assert_allclose(values[0][:-1, 0], single_ones, rtol=1e-5)
        loss = weights @ fisher(gradients) @ weights / 2
        np.testing.assert_allclose(values[-1][0, 0], loss, rtol=1e-5)


def test_it_is_the_model_loss_of_the_joint_update() -> None:
    """So that scores and updates of groups mean the same."""
    gradients, weights = problem(6)
    update = jax.jit(joint_update)
    for group in (np.arange(4), np.arange(0, WIDTH, 3)):
        kept = ~np.isin(np.arange(WIDTH), group)
        zeros = np.zeros(6, np.float32)
        delta = update(*single(gradients, weights), kept, zeros, DAMPING)
        loss = delta @ fisher(gradients) @ delta / 2
        np.testing.assert_allclose(oracle(gradients, weights, group), loss, rtol=1e-5)


def test_every_choice_of_n_of_m_is_compared() -> None:
    kept, size = 4, 8
    gradients, weights = problem(6)
    weights[:3] = 0.0  # pruned already: no gradient either
    gradients[:, :3] = 0.0
    removals = np.array(list(combinations(range(size), size - kept)), np.int32)
    table = np.arange(WIDTH, dtype=np.int32).reshape(-1, size)
    (values,) = forms(
        *single(gradients, weights), [table], np.float32(DAMPING), removals=removals
    )
    expected = [
        [oracle(gradients, weights, group[chosen]) for chosen in removals]
        for group in table
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_what_rounding_moves_is_refused() -> None:
    """With as many samples as weights, all alike, λ is all that F⁻¹ is read from."""
    random = np.random.default_rng(0)
    rows = 1e3 * (1 + 1e-2 * random.standard_normal((8, 8)))
    weights, table = random.standard_normal(8), np.arange(8, dtype=np.int32)[None]
    for damping, known in ((1e-1, True), (1e-9, False)):
        given = single(rows, weights)
        (found,) = forms(*given, [table[:, :4]], np.float32(damping))
        expected = oracle(np.float64(given[0]), weights, np.arange(4), damping)
        if known:
            np.testing.assert_allclose(found[0, 0], expected, rtol=1e-4)
        else:
            assert np.isnan(found).all()
