"""Shapes and random weights of Flax models, also as PyTorch state dicts."""

import jax
import numpy as np

from woodfisher_jax.weights.state_dicts import to_state_dict


def shapes_of(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def random_variables(model, x, seed=0):
    """Drawn in NumPy, which compiles nothing; and as a state dict in float64."""
    rng = np.random.default_rng(seed)
    shapes = shapes_of(model, x)
    variables = jax.tree.map(lambda leaf: draw(rng, leaf), shapes)
    state = {key: np.float64(array) for key, array in to_state_dict(variables).items()}
    return variables, state


def draw(rng, leaf):
    if len(leaf.shape) == 1:
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    spread = np.sqrt(2 / np.prod(leaf.shape[:-1]))
    return rng.normal(0, spread, leaf.shape).astype(leaf.dtype)
