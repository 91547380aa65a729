"""Random arrays by NumPy: XLA would compile a function for each shape."""

import jax
import numpy as np


def normal(number: int, *shape: int) -> jax.Array:
    """Standard normal numbers in float32, the same for the same ``number``."""
    numbers = np.random.default_rng(number).normal(size=shape).astype(np.float32)
    return jax.device_put(numbers)  # jnp.asarray compiles for each shape, too
