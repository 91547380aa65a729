"""How many weights of each layer stay, by what they mean to the network's outputs."""

from typing import Any

import numpy as np

from woodfisher_jax.layerwise.layers import Layer
from woodfisher_jax.layerwise.sensitivity import Sensitivity
from woodfisher_jax.trees.masks import num_kept

LEAST_SHARE = 0.25
"""Of the share of weights that stay in all layers together, what each keeps at least: a
layer that loses all its weights ends the network, whatever each of them is worth.
"""


def scores_of(leaf: Any, layer: Layer, found: Sensitivity) -> np.ndarray:
    """What each weight of a layer is worth to the outputs of the network [weights].

    ``w_oi² E[g_o²] E[x_i²]``: the diagonal of the layer's Kronecker factors.
    """
    weights = np.asarray(leaf).reshape(-1)[layer.entries()].astype(np.float32)
    g = np.asarray(found.outputs)[layer.groups][:, :, None]
    x = np.asarray(found.inputs)[layer.groups][:, layer.columns][:, None, :]
    return (np.square(weights) * g * x).reshape(-1)


def shared_out(scores: list[np.ndarray], level: float, spread: float) -> list[int]:
    """How many weights of each layer stay, by one threshold for all layers.

    Args:
        scores: Of each layer, [weights]; they are sorted in place, for together they
            are as large as the network.
        level: Sparsity of all together.
        spread: How far the sparsity of a layer may be from it.
    """
    sizes = np.array([len(layer) for layer in scores])
    sparsest = min(level + spread, 1 - LEAST_SHARE * (1 - level))
    least = np.array([num_kept(n, sparsest) for n in sizes])
    most = np.array([num_kept(n, max(level - spread, 0.0)) for n in sizes])
    goal = num_kept(int(sizes.sum()), level)
    for layer in scores:
        layer.sort()

    def counts(threshold: float) -> np.ndarray:
        above = [len(s) - np.searchsorted(s, threshold, "right") for s in scores]
        return np.clip(above, least, most)

    low, high = 1e-45, max(float(s[-1]) for s in scores)
    for _ in range(100):
        middle = float(np.sqrt(low) * np.sqrt(high))
        low, high = (middle, high) if counts(middle).sum() > goal else (low, middle)
    found = counts(high)
    # What ties at the threshold leave over goes to the largest layers with room.
    for i in np.argsort(-sizes):
        found[i] += min(most[i] - found[i], goal - int(found.sum()))
    return [int(n) for n in found]


def importance_of(squares: np.ndarray) -> np.ndarray:
    """Weights of a layer's outputs, √E[g²] with mean square 1 [groups, outputs]."""
    mean = np.mean(squares) or 1.0
    # An output that means nothing still gets a solution.
    return np.sqrt(np.maximum(squares / mean, 1e-6)).astype(np.float32)
