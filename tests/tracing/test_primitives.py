"""Settings of primitives as the versions of JAX name them."""

import jax
import jax.numpy as jnp
import pytest

from woodfisher_jax.tracing.primitives import convolution_positions, scan_operands


def test_a_scan_s_operands_are_constants_carry_and_stacks() -> None:
    """What JAX's versions call them differs."""

    def net(w, x):
        def body(carry, row):
            h, rounds = carry
            return (jnp.tanh(h @ row) * x.sum(), rounds + 1), rounds

        return jax.lax.scan(body, (x, 0), w)

    jaxpr = jax.make_jaxpr(net)(jnp.ones((3, 4, 4)), jnp.ones((2, 4))).jaxpr
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    parts = scan_operands(scan, scan.invars)
    assert [[v.aval.shape for v in part] for part in parts] == [
        [(2, 4)],
        [(2, 4), ()],
        [(3, 4, 4)],
    ]


@pytest.mark.parametrize(
    ("strides", "dilation", "positions"),
    [((1, 1), (1, 1), 8 * 6), ((2, 3), (1, 1), 4 * 2), ((1, 1), (2, 1), 8 * 6)],
    ids=["plain", "strides", "transposed along an axis"],
)
def test_a_weight_is_used_at_positions_that_hold_numbers(
    strides: tuple[int, int], dilation: tuple[int, int], positions: int
) -> None:
    def net(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            strides,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            lhs_dilation=dilation,
        )

    jaxpr = jax.make_jaxpr(net)(jnp.ones((3, 3, 4, 5)), jnp.ones((2, 8, 6, 4))).jaxpr
    (equation,) = jaxpr.eqns
    assert convolution_positions(equation) == positions
