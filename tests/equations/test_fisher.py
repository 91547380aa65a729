"""The damped Fisher of one block: three solvers against the float64 inverse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.equations.fisher import (
    SOLVERS,
    choose_solver,
    fisher_product,
    recursive_inverse,
)
from woodfisher_jax.equations.precision import change_by_rounding

WIDTH = 12
DAMPING = 1e-2
# N below and above c; 40 is no multiple of the recursion's rank either.
COUNTS = (5, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 12)))


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
    """Diagonal and all columns of F⁻¹ by every solver."""
    found = {}
    for name, solver in SOLVERS.items():
        factor = solver.factorize(gradients, damping)
        units = jnp.eye(gradients.shape[1], dtype=gradients.dtype)
        product = partial(solver.product, factor, gradients, damping)
        found[name] = (
            solver.diagonal(factor, gradients, damping),
            jax.vmap(product)(units),
        )
    return found


def invert(gradients: np.ndarray, damping: float = DAMPING) -> dict:
    """For each solver: diag(F⁻¹) and F⁻¹ column by column."""
    found = _everything(jnp.asarray(gradients), jnp.float32(damping))
    return jax.tree.map(np.asarray, found)


# ------------------------------------------------------------------ against oracles


def test_the_two_oracles_agree() -> None:
    for count in (1, 5, 12, 40):
        g = gradients_of(count)
        expected = np.linalg.inv(fisher(g, DAMPING))
        found = rank_one_recursion(g, DAMPING)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_inverts_the_damped_fisher(count, solver) -> None:
    g = gradients_of(count)
    expected = np.linalg.inv(fisher(g, DAMPING))
    diagonal, columns = invert(g)[solver]
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=1e-6)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(columns, expected, atol=1e-6 * scale)


def in_sample_space(
    gradients: np.ndarray, damping: float, vector: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Oracle: diag(F⁻¹) and F⁻¹v of a wide block in float64, which has no F [c, c]."""
    g = np.asarray(gradients, np.float64)
    system = np.linalg.inv(len(g) * damping * np.eye(len(g)) + g @ g.T)
    diagonal = 1.0 - np.einsum("nc,nm,mc->c", g, system, g, optimize=True)
    return diagonal / damping, (vector - g.T @ (system @ (g @ vector))) / damping


# Columns that fill their panels, and columns that do not with rows that are halved.
@pytest.mark.parametrize(("count", "width"), [(7, 2048), (300, 2501)])
def test_wide_blocks_are_multiplied_panel_by_panel(count: int, width: int) -> None:
    random = np.random.default_rng(1)
    gradients = random.standard_normal((count, width)).astype(np.float32)
    vector = random.standard_normal(width).astype(np.float32)

    @jax.jit
    def found(gradients: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        solver = SOLVERS["sample_space"]
        factor = solver.factorize(gradients, DAMPING)
        product = solver.product(factor, gradients, DAMPING, vector)
        return solver.diagonal(factor, gradients, DAMPING), product

    expected = in_sample_space(gradients, DAMPING, vector.astype(np.float64))
    for one, other in zip(found(gradients, vector), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6 * abs(other).max())


def test_wide_blocks_are_mapped_where_64_bits_are_not_enabled() -> None:
    random = np.random.default_rng(1)
    gradients = random.standard_normal((2, 1, 2048)).astype(np.float32)
    solver = SOLVERS["sample_space"]
    factors = jax.vmap(lambda g: solver.factorize(g, DAMPING))(gradients)
    expected = 1 / np.sqrt(DAMPING + np.sum(gradients**2, axis=2))
    np.testing.assert_allclose(factors[:, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_the_recursion_is_the_paper_s(count) -> None:
    g = gradients_of(count)
    expected = rank_one_recursion(g, DAMPING)
    found = invert(g)["recursion"][1]
    np.testing.assert_allclose(found, expected, atol=1e-5 / DAMPING)


@pytest.mark.parametrize("rank", [1, pytest.param(64, marks=pytest.mark.slow)])
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


def test_a_block_of_one_weight_is_the_diagonal_fisher() -> None:
    g = gradients_of(12)[:, :1]
    expected = 1 / (DAMPING + np.mean(np.asarray(g, np.float64) ** 2))
    for diagonal, columns in invert(g).values():
        np.testing.assert_allclose(diagonal, [expected], rtol=1e-6)
        np.testing.assert_allclose(columns, [[expected]], rtol=1e-6)


def test_without_gradients_the_inverse_is_one_over_the_damping() -> None:
    for diagonal, columns in invert(np.zeros((5, WIDTH), np.float32)).values():
        np.testing.assert_allclose(diagonal, np.full(WIDTH, 1 / DAMPING), rtol=1e-6)
        np.testing.assert_allclose(columns, np.eye(WIDTH) / DAMPING, rtol=1e-6)


# -------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("count", COUNTS)
def test_the_diagonal_is_positive_and_at_most_one_over_the_damping(count) -> None:
    for diagonal, _ in invert(gradients_of(count)).values():
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
    for diagonal, columns in invert(g).values():
        np.testing.assert_allclose(diagonal[silent], 1 / DAMPING, rtol=1e-6)
        assert (columns[np.ix_(silent, rest)] == 0).all()
        assert (columns[np.ix_(rest, silent)] == 0).all()
        np.testing.assert_allclose(diagonal[rest], np.diag(alone), rtol=1e-6)


# --------------------------------------------------------------------------- precision


def test_it_leaves_float32_the_default() -> None:
    solver, g = SOLVERS["sample_space"], jnp.asarray(gradients_of(5))
    assert solver.factorize(g, DAMPING).dtype == jnp.float64
    assert jnp.asarray(1.5).dtype == jnp.float32


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, marks=[pytest.mark.slow] * (s == "recursion")) for s in SOLVERS],
)
def test_a_factor_that_float64_cannot_give_is_none(solver) -> None:
    g = jnp.asarray(1e6 * np.repeat(gradients_of(1), 5, axis=0))
    assert not np.isfinite(SOLVERS[solver].factorize(g, 1e-9)).any()


def test_a_damping_that_rounding_hides_is_refused_in_sample_space() -> None:
    """With as many samples as weights S is well conditioned, and F is not."""
    random = np.random.default_rng(0)
    g = 1e3 * (1 + 1e-2 * random.standard_normal((WIDTH, WIDTH))).astype(np.float32)
    exact = g.astype(np.float64)
    assert np.linalg.cond(exact) ** 2 < 1e9
    solver, v = SOLVERS["sample_space"], np.ones(WIDTH, np.float32)
    assert np.isfinite(np.asarray(solver.factorize(g, 1e-6))).all()
    for damping, known in ((1e-3, True), (1e-9, False)):
        factor = solver.factorize(g, damping)
        diagonal = np.asarray(solver.diagonal(factor, g, damping))
        product = np.asarray(solver.product(factor, g, damping, v))
        inverse = np.linalg.inv(damping * np.eye(WIDTH) + exact.T @ exact / WIDTH)
        if known:
            np.testing.assert_allclose(diagonal, np.diag(inverse), rtol=1e-4)
            most = 1e-4 * np.abs(inverse @ v).max()
            np.testing.assert_allclose(product, inverse @ v, atol=most)
        else:
            assert not np.isfinite(diagonal).any()
            assert not np.isfinite(product).any()


def test_rounding_of_a_vector_in_the_span_is_divided_by_the_damping() -> None:
    g, v = jnp.asarray(gradients_of(5)), jnp.asarray(gradients_of(1, seed=1)[0])
    unit = change_by_rounding(lambda u: u, v, v)
    assert 0.2 * 2**-24 < float(unit) <= 1.01 * 2**-24
    solver, mean = SOLVERS["sample_space"], jnp.mean(g, axis=0)
    factor = solver.factorize(g, 1e-6)
    multiply = partial(solver.product, factor, g, 1e-6)
    assert change_by_rounding(multiply, mean, multiply(mean)) > 1e4 * unit


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


def test_a_tpu_is_given_no_factorization_in_float64() -> None:
    """Which its compiler refuses over several devices."""
    many = jax.vmap(lambda g: SOLVERS["sample_space"].factorize(g, 0.1))
    traced = jax.jit(many).trace(jax.ShapeDtypeStruct((2, 5, 12), np.float32))
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "potrf" in text["cpu"]
    assert "cholesky" not in text["tpu"]
    assert "triangular_solve" not in text["tpu"]
