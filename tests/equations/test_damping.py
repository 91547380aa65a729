"""Damping by leave-one-out, against fits without each row."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.equations import damping
from woodfisher_jax.equations.damping import (
    MULTIPLES,
    ChosenDamping,
    choose_damping,
    leave_one_out,
    leave_one_out_residuals,
    residuals_by_factors,
)


def chosen_of(gram: Any, right: Any, least: float = 0.0) -> ChosenDamping:
    gram, right = (jnp.asarray(a, jnp.float32) for a in (gram, right))
    return choose_damping(leave_one_out(gram, right), len(right), least)


def problem(
    num_samples: int = 12, width: int = 30, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a few directions, and values that a step along them would give."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(num_samples, 4)) @ rng.normal(size=(4, width))
    rows += 0.1 * rng.normal(size=rows.shape)
    right = rows @ rng.normal(size=width) + noise * rng.normal(size=num_samples)
    return rows, right


@pytest.mark.parametrize("residuals", [leave_one_out_residuals, residuals_by_factors])
@pytest.mark.parametrize("shift", [0.1, 3.0, 200.0])
def test_residuals_are_those_of_fits_without_the_row(shift: float, residuals) -> None:
    rows, right = problem()
    gram = jnp.asarray(rows @ rows.T, jnp.float32)
    found = residuals(
        gram, jnp.asarray(right, jnp.float32), jnp.asarray([shift], jnp.float32)
    )[0]
    for n in range(len(rows)):
        others = np.arange(len(rows)) != n
        kernel = rows[others] @ rows[others].T + shift * np.eye(len(rows) - 1)
        step = rows[others].T @ np.linalg.solve(kernel, right[others])
        expected = right[n] - rows[n] @ step
        np.testing.assert_allclose(found[n], expected, rtol=2e-3, atol=2e-3)


def test_on_a_tpu_there_are_no_eigenvalues() -> None:
    """Its compiler takes minutes for those of a few hundred rows in float64."""
    traced = leave_one_out.trace(jnp.eye(3), jnp.ones(3))
    assert "syevd" in traced.lower(lowering_platforms=("cuda",)).as_text()
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert not re.search("(?i)eigh|syevd|cholesky", on_tpu)


def test_the_choice_has_the_smallest_error_of_the_path() -> None:
    rows, right = problem(noise=3.0)
    gram = rows @ rows.T
    mean = np.trace(gram) / len(rows)
    chosen = chosen_of(gram, right)
    errors = []
    for multiple in MULTIPLES:
        inverse = np.linalg.inv(gram + multiple * mean * np.eye(len(rows)))
        errors.append(np.mean((inverse @ right / np.diag(inverse)) ** 2))
    assert chosen.multiple == MULTIPLES[int(np.argmin(errors))]
    assert chosen.error == pytest.approx(min(errors) / np.mean(right**2), rel=1e-3)
    # N λ is the multiple of the mean eigenvalue.
    assert chosen.damping * len(rows) == pytest.approx(chosen.multiple * mean, rel=1e-4)


def test_multiples_below_the_least_are_not_taken() -> None:
    rows, right = problem()
    gram, right = rows @ rows.T, right
    free = chosen_of(gram, right)
    bound = chosen_of(gram, right, least=0.5)
    assert free.multiple < 0.5
    assert bound.multiple == min(m for m in MULTIPLES if m >= 0.5)


def test_some_rows_choose_the_shift_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, right = problem(num_samples=40, noise=3.0)
    some = slice(None, None, 3)
    gram, few = rows @ rows.T, rows[some] @ rows[some].T
    chosen = chosen_of(few, right[some])
    monkeypatch.setattr(damping, "MOST_ROWS", 14)
    leave_one_out.clear_cache()
    found = chosen_of(gram, right)
    leave_one_out.clear_cache()
    assert found.multiple == chosen.multiple
    assert 40 * found.damping == pytest.approx(14 * chosen.damping, rel=1e-5)


def test_noise_asks_for_more_damping() -> None:
    found = []
    for noise in (0.0, 30.0):
        rows, right = problem(noise=noise)
        found.append(chosen_of(rows @ rows.T, right).multiple)
    assert found[0] < found[1]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_multiple_does_not_depend_on_units(scale: float) -> None:
    rows, right = problem(noise=3.0)
    gram = rows @ rows.T
    plain, scaled = (chosen_of(s**2 * gram, s * right) for s in (1.0, scale))
    assert scaled.multiple == plain.multiple
    assert scaled.damping == pytest.approx(scale**2 * plain.damping, rel=1e-3)


def test_where_nothing_is_to_be_predicted_the_least_damping_does() -> None:
    rows, right = problem()
    found = chosen_of(rows @ rows.T, np.zeros(len(right)), least=1e-3)
    assert found.multiple == pytest.approx(1e-3, rel=0.01)
    assert found.error == 0


def test_without_gradients_no_damping_is_advised() -> None:
    rows, right = problem()
    with pytest.raises(
        ValueError, match=r"no weight has a gradient.*all zero"
    ) as found:
        chosen_of(0 * rows @ rows.T, right)
    assert "damping=" not in str(found.value)


@pytest.mark.parametrize("case", ["nan", "one row"])
def test_a_problem_without_a_choice_is_refused(case: str) -> None:
    rows, right = problem()
    if case == "nan":
        right[3] = np.nan
    if case == "one row":
        rows, right = rows[:1], right[:1]
    with pytest.raises(ValueError, match=r"damping='auto'.*give a number"):
        chosen_of(rows @ rows.T, right)
