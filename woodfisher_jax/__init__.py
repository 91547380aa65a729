"""Prune neural networks with second-order information (WoodFisher) in JAX."""

from woodfisher_jax.pruning.curvature import CurvatureError
from woodfisher_jax.pruning.masks import (
    apply_masks,
    init_masks,
    sparsity,
    sparsity_by_path,
)
from woodfisher_jax.pruning.methods import METHODS
from woodfisher_jax.pruning.prune import PruneInfo, prune

__all__ = [
    "METHODS",
    "CurvatureError",
    "PruneInfo",
    "apply_masks",
    "init_masks",
    "prune",
    "sparsity",
    "sparsity_by_path",
]
