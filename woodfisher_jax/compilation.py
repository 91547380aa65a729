"""Functions as programs of their own, compiled without a slow part of XLA on a CPU."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import jax
import jaxlib

QUICK: dict[str, bool | str] = {}
"""For XLA on a CPU: loops by LLVM directly, without a pipeline of MLIR for each.

A step is a few large products and hundreds of small loops, whose compilation takes
longer than they ever run. XLA refuses an option that it does not have, and since
jaxlib 0.11.1 there is no choice.
"""
if jaxlib.version.__version_info__ < (0, 11, 1):
    QUICK["xla_cpu_use_fusion_emitters"] = False

P = ParamSpec("P")
T = TypeVar("T")


def quickly_compiled(*static: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function a program of its own, which no other program calls.

    Args:
        static: Names of its arguments that are no arrays.
    """

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @cache
        def program(platform: str) -> Callable[P, T]:
            options = QUICK if platform == "cpu" else None
            found: Callable[P, T] = jax.jit(
                function, static_argnames=static, compiler_options=options
            )
            return found

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return program(jax.default_backend())(*args, **kwargs)

        return call

    return decorated
