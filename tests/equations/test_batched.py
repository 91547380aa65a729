"""Many blocks, as the platform likes best for which they are compiled."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.curvature import checked, programs
from woodfisher_jax.equations.batched import map_blocks
from woodfisher_jax.equations.fisher import recursive_inverse
from woodfisher_jax.equations.groups import group_forms

MATRICES = jnp.eye(3) + jnp.arange(7.0)[:, None, None] * jnp.ones((3, 3))


def factors(matrices):
    return map_blocks(jnp.linalg.cholesky, matrices, 2)


def test_each_block_has_its_own_result(monkeypatch) -> None:
    expected = np.linalg.cholesky(np.asarray(MATRICES, np.float64))
    np.testing.assert_allclose(factors(MATRICES), expected, rtol=1e-5)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda blocks, cpu, default: default(blocks)
    )
    np.testing.assert_allclose(factors(MATRICES), expected, rtol=1e-5)


def shapes(function, arguments, platform):
    """Of the matrices that are factorized, in a program for a platform."""
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r"(?:@lapack_.potrf_ffi|@cusolver_potrf_ffi).*", text)
    assert calls
    return {re.search(r"tensor<([\dx]+)xf", call)[1] for call in calls}


def diagonals(gradients):
    run = checked.run_blocks.__wrapped__
    return run(checked.diagonal, gradients, (), jnp.ones(()), "sample_space")


def forms(gradients):
    columns = jnp.arange(40).reshape(2, 20)
    return group_forms(gradients, jnp.ones(40), [columns], jnp.ones(()), "dense")


@pytest.mark.parametrize(
    ("function", "argument", "one", "several"),
    [
        (factors, MATRICES, {"3x3"}, {"2x3x3", "1x3x3"}),
        (
            partial(programs.factors.__wrapped__, damping=1.0),
            {0: MATRICES},
            {"3x3"},
            {"7x3x3"},
        ),
        (diagonals, jnp.ones((7, 3, 5)), {"3x3"}, {"7x3x3"}),
        (forms, jnp.ones((50, 40)), {"40x40", "20x20"}, {"40x40", "2x20x20"}),
    ],
    ids=["map_blocks", "factors", "run_blocks", "group_forms"],
)
def test_the_platform_is_that_which_the_program_is_for(
    function, argument, one, several
) -> None:
    """Not the one on which it is lowered, such as a CPU that compiles for a GPU."""
    assert shapes(function, [argument], "cpu") == one
    assert shapes(function, [argument], "cuda") == several


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (diagonals, jnp.ones((7, 3, 5))),
        (forms, jnp.ones((50, 40))),
        (partial(recursive_inverse, damping=1.0), jnp.ones((3, 5))),
    ],
    ids=["run_blocks", "group_forms", "recursion"],
)
def test_on_a_tpu_no_matrix_is_factorized(function, argument) -> None:
    """Its compiler refuses Cholesky in float64 over several devices."""
    traced = jax.jit(function).trace(argument)
    on_gpu, on_tpu = (
        traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu")
    )
    assert "potrf" in on_gpu
    assert not re.search("potrf|cholesky|triangular_solve", on_tpu)
