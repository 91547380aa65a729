"""JAX's primitives by what they do with the entries of arrays, and their settings."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_T = TypeVar("_T")

Position = tuple[int, ...]
"""An equation of a jaxpr: one index for each level of nested calls."""

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that call one function once, and the parameter with its jaxpr."""

PRODUCTS = ("dot_general", "conv_general_dilated")
"""Primitives that multiply and add up."""

RAGGED_PRODUCTS = ("ragged_dot", "ragged_dot_general")
"""Primitives that multiply each row with the matrix of its own group."""

_OPAQUE_PRODUCTS = ("custom_call", "ffi_call", "pallas_call", *RAGGED_PRODUCTS)

REDUCTIONS = (
    "argmax",
    "argmin",
    "reduce_and",
    "reduce_max",
    "reduce_min",
    "reduce_or",
    "reduce_prod",
    "reduce_sum",
    "reduce_xor",
)
"""Primitives that leave out axes, and whose setting ``axes`` says which."""

SAME = (
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
)
"""Primitives that give each of their operands as it is, but for rounding and place."""

RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
"""Primitives that give all entries of their operand in another shape."""

ALONG = {
    "cumlogsumexp": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumsum": "axis",
    "sort": "dimension",
}
"""Primitives that mix the entries of one axis, and what names it."""

MADE = ("iota", "random_bits")
"""Primitives that give numbers by their place: made whole, then cut."""

_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt
ceil clamp clz complex conj cos cosh custom_lin_add digamma div eq eq_to erf erf_inv
erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite lax_convert le le_to lgamma
log log1p logistic lt lt_to max min mul mulhi ne neg nextafter not or population_count
pow real rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset((*_ELEMENTWISE.split(), *SAME))
"""Primitives whose operands meet entry by entry."""

_KEEPS_ZERO = """
abs add add_any concatenate neg pad reduce_sum rev slice split stack sub tile transpose
unstack
"""
KEEPS_ZERO = frozenset((*_KEEPS_ZERO.split(), *SAME, *RESHAPES))
"""Primitives that are zero where all their operands are."""

FIRST_ZERO = ("div", "dynamic_slice", "gather")
"""Primitives that are zero where their first operand is."""


def opened(jaxpr: Any) -> Jaxpr:
    """The jaxpr without its constants, if it has them."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def called(equation: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr of a call and its constants."""
    inner = equation.params[CALLS[equation.primitive.name]]
    return opened(inner), inner.consts if isinstance(inner, ClosedJaxpr) else ()


def scan_operands(
    equation: Any, operands: Sequence[_T]
) -> tuple[list[_T], list[_T], list[_T]]:
    """A scan's constants, what it carries, and what it takes a row of in each round.

    Args:
        equation: The scan.
        operands: One thing for each of its operands.
    """
    settings = equation.params
    if "num_consts" in settings:
        first, second = settings["num_consts"], settings["num_carry"]
    else:
        consts, carry, _ = settings["ft_in"].unpack()  # Since jax 0.12.
        first, second = len(consts.vals), len(carry.vals)
    own = list(operands)
    return own[:first], own[first : first + second], own[first + second :]


def convolution_positions(equation: Any) -> int:
    """At how many positions of an example a convolution uses each weight.

    The output's; those of the input along an axis that is dilated, as in a transposed
    convolution, whose input is mostly zeros then.
    """
    settings = equation.params
    numbers = settings["dimension_numbers"]
    images, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return math.prod(
        output[after] if dilation == 1 else images[before]
        for after, before, dilation in zip(
            numbers.out_spec[2:],
            numbers.lhs_spec[2:],
            settings["lhs_dilation"],
            strict=True,
        )
    )


def dependent(jaxpr: Jaxpr, active: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on its active inputs."""
    known = dict(zip(jaxpr.invars, active, strict=True))

    def read(atom: Any) -> bool:
        return not isinstance(atom, Literal) and known.get(atom, False)

    for equation in jaxpr.eqns:
        on = any(map(read, equation.invars))
        known.update(dict.fromkeys(equation.outvars, on))
    return [read(atom) for atom in jaxpr.outvars]


def contains_product(equation: Any) -> bool:
    """Whether an equation is, or calls, a product that may have a weight in it."""
    if equation.primitive.name in (*PRODUCTS, *_OPAQUE_PRODUCTS):
        return True
    return any(contains_product(e) for j in inner_jaxprs(equation) for e in j.eqns)


def inner_jaxprs(equation: Any) -> list[Jaxpr]:
    """The jaxprs that an equation has: of what it calls, of rounds, of branches."""
    return [
        opened(entry)
        for field in equation.params.values()
        for entry in (field if isinstance(field, (tuple, list)) else [field])
        if isinstance(entry, (Jaxpr, ClosedJaxpr))
    ]
