"""A layer whose inputs depend on one another, and differ from the unpruned ones."""

import numpy as np

OUTPUTS, INPUTS = 12, 16


def one_layer() -> dict[str, np.ndarray]:
    """Weights W, inputs x and z, and the second moments E[x xᵀ] and E[z xᵀ]."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(INPUTS, INPUTS))
    z = rng.normal(size=(300, INPUTS)) @ mixing
    x = z + 0.1 * rng.normal(size=z.shape)
    return {
        "weights": rng.normal(size=(OUTPUTS, INPUTS)),
        "x": x,
        "z": z,
        "moment": x.T @ x / len(x),
        "cross": z.T @ x / len(x),
    }
