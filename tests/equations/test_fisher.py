"""The damped Fisher of one block: three solvers against the float64 inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.equations.fisher import (
    SOLVERS,
    choose_solver,
    diagonal_error,
    fisher_product,
    recursive_inverse,
    refined_product,
)

WIDTH = 12
DAMPING = 1e-2
# N below, at and above c; 40 is no multiple of the recursion's rank either.
COUNTS = (1, 5, 12, 40)


def gradients_of(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, WIDTH)).astype(np.float32)


def fisher(gradients: np.ndarray, damping: float) -> np.ndarray:
    """Oracle: λ I + GᵀG / N, formed in float64."""
    g = np.asarray(gradients, np.float64)
    return damping * np.eye(g.shape[1]) + g.T @ g / len(g)


def rank_one_recursion(gradients: np.ndarray, damping: float) -> np.ndarray:
    """Oracle: Eq. 9 of the paper, F⁻¹ <- F⁻¹ - v vᵀ / (N + gᵀv) with v = F⁻¹g."""
    g = np.asarray(gradients, np.float64)
    inverse = np.eye(g.shape[1]) / damping
    for one in g:
        v = inverse @ one
        inverse = inverse - np.outer(v, v) / (len(g) + one @ v)
    return inverse


@jax.jit
def _everything(gradients: jax.Array, damping: jax.Array) -> dict:
    """Diagonal and all columns of F⁻¹ by every solver, plain and refined."""
    found = {}
    for name, solver in SOLVERS.items():
        factor = solver.factorize(gradients, damping)
        units = jnp.eye(gradients.shape[1], dtype=gradients.dtype)
        found[name] = (
            solver.diagonal(factor, gradients, damping),
            jax.vmap(lambda v, s=solver, f=factor: s.product(f, gradients, damping, v))(
                units
            ),
            jax.vmap(
                lambda v, s=solver, f=factor: refined_product(
                    s, f, gradients, damping, v
                )[0]
            )(units),
        )
    return found


def invert(gradients: np.ndarray, damping: float = DAMPING) -> dict:
    """For each solver: diag(F⁻¹), F⁻¹ column by column, and the same refined."""
    found = _everything(jnp.asarray(gradients), jnp.float32(damping))
    return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


# ------------------------------------------------------------------ against oracles


def test_the_two_oracles_agree() -> None:
    for count in COUNTS:
        g = gradients_of(count)
        expected = np.linalg.inv(fisher(g, DAMPING))
        found = rank_one_recursion(g, DAMPING)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_inverts_the_damped_fisher(count, solver) -> None:
    g = gradients_of(count)
    expected = np.linalg.inv(fisher(g, DAMPING))
    diagonal, columns, refined = invert(g)[solver]
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=1e-3)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(columns, expected, atol=1e-4 * scale)
    np.testing.assert_allclose(refined, expected, atol=2e-5 * scale)


@pytest.mark.parametrize("count", COUNTS)
def test_the_recursion_is_the_paper_s(count) -> None:
    g = gradients_of(count)
    expected = rank_one_recursion(g, DAMPING)
    found = invert(g)["recursion"][1]
    np.testing.assert_allclose(found, expected, atol=1e-5 / DAMPING)


@pytest.mark.parametrize("rank", [1, 64])
def test_the_rank_of_a_recursion_step_does_not_matter(rank) -> None:
    g = gradients_of(12)
    found = jax.jit(recursive_inverse, static_argnums=2)(
        jnp.asarray(g), jnp.float32(DAMPING), rank
    )
    expected = np.linalg.inv(fisher(g, DAMPING))
    np.testing.assert_allclose(found, expected, atol=1e-5 / DAMPING)


@pytest.mark.parametrize("count", COUNTS)
def test_fisher_product_is_multiplication_by_the_fisher(count) -> None:
    g = gradients_of(count)
    v = gradients_of(1, seed=1)[0]
    found = fisher_product(jnp.asarray(g), jnp.float32(0.3), jnp.asarray(v))
    expected = fisher(g, np.float32(0.3)) @ v
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ known special cases


@pytest.mark.parametrize("count", [1, 12])
def test_a_block_of_one_weight_is_the_diagonal_fisher(count) -> None:
    g = gradients_of(count)[:, :1]
    expected = 1 / (DAMPING + np.mean(np.asarray(g, np.float64) ** 2))
    for diagonal, columns, _ in invert(g).values():
        # 1 - leverage cancels where the gradient is far above the damping.
        np.testing.assert_allclose(diagonal, [expected], rtol=2e-4)
        np.testing.assert_allclose(columns, [[expected]], rtol=2e-4)


def test_without_gradients_the_inverse_is_one_over_the_damping() -> None:
    for diagonal, columns, _ in invert(np.zeros((5, WIDTH), np.float32)).values():
        np.testing.assert_allclose(diagonal, np.full(WIDTH, 1 / DAMPING), rtol=1e-6)
        np.testing.assert_allclose(columns, np.eye(WIDTH) / DAMPING, rtol=1e-6)


# -------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("count", COUNTS)
def test_the_diagonal_is_positive_and_at_most_one_over_the_damping(count) -> None:
    for diagonal, _, _ in invert(gradients_of(count)).values():
        assert (diagonal > 0).all()
        assert (diagonal <= (1 + 1e-5) / DAMPING).all()


@pytest.mark.parametrize("count", [5, 40])
def test_the_order_of_samples_and_of_weights_does_not_matter(count) -> None:
    g, random = gradients_of(count), np.random.default_rng(2)
    rows, columns = random.permutation(count), random.permutation(WIDTH)
    straight, other = invert(g), invert(g[rows][:, columns])
    for solver in SOLVERS:
        expected = straight[solver][0][columns]
        np.testing.assert_allclose(other[solver][0], expected, rtol=1e-3)


@pytest.mark.parametrize("count", COUNTS)
def test_weights_without_gradient_decouple(count) -> None:
    g = gradients_of(count)
    silent = np.asarray([0, 7, 8])
    g[:, silent] = 0
    rest = np.setdiff1d(np.arange(WIDTH), silent)
    alone = np.linalg.inv(fisher(g[:, rest], DAMPING))
    for diagonal, columns, refined in invert(g).values():
        np.testing.assert_allclose(diagonal[silent], 1 / DAMPING, rtol=1e-6)
        for found in (columns, refined):
            assert (found[np.ix_(silent, rest)] == 0).all()
            assert (found[np.ix_(rest, silent)] == 0).all()
        np.testing.assert_allclose(diagonal[rest], np.diag(alone), rtol=1e-3)


# ------------------------------------------------------------- refinement and its check


@pytest.mark.parametrize("solver", SOLVERS)
def test_refinement_is_at_least_as_close_as_the_plain_product(solver) -> None:
    g = 10 * gradients_of(5)
    expected = np.linalg.inv(fisher(g, DAMPING))
    _, plain, refined = invert(g)[solver]
    plain_error = np.abs(plain - expected).max()
    assert np.abs(refined - expected).max() <= 1.05 * plain_error


def perturbed_error(solver_name: str, spoil) -> float:
    g = jnp.asarray(gradients_of(40 if solver_name == "dense" else 5))
    solver = SOLVERS[solver_name]

    def check(g, damping):
        factor = solver.factorize(g, damping)
        diagonal = solver.diagonal(factor, g, damping)
        return diagonal_error(solver, factor, g, damping, spoil(diagonal))

    return float(jax.jit(check)(g, jnp.float32(DAMPING)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_estimate_is_small_for_a_good_diagonal(solver) -> None:
    assert perturbed_error(solver, lambda d: d) < 2e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("relative", [1e-2, 1.0])
def test_the_error_estimate_sees_a_wrong_diagonal(solver, relative) -> None:
    found = perturbed_error(solver, lambda d: d * (1 + relative))
    assert found == pytest.approx(relative, rel=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
def test_a_diagonal_that_cannot_be_is_infinitely_wrong(value) -> None:
    assert perturbed_error("dense", lambda d: d.at[6].set(value)) == np.inf


@pytest.mark.parametrize(
    ("num_samples", "width", "solver"),
    [
        (100, 2_000, "sample_space"),
        (100, 31_360, "sample_space"),
        (1, 2, "sample_space"),
        (1_000, 200, "dense"),
        (10_000, 1, "dense"),
    ],
)
def test_the_cheaper_solver_is_chosen(num_samples, width, solver) -> None:
    assert choose_solver(num_samples, width) == solver
