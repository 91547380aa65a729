"""Prune neural networks with second-order information (WoodFisher) in JAX.

``prune`` does it in one call. Its steps are pure functions in ``gradients``,
``blocks``, ``fisher`` (one block), ``curvature`` (many), ``obs`` (statistics and
updates), ``masks`` and ``schedules``.
"""

from woodfisher_jax.pruning import (
    blocks,
    curvature,
    fisher,
    gradients,
    masks,
    obs,
    schedules,
)
from woodfisher_jax.pruning.curvature import CurvatureError
from woodfisher_jax.pruning.disk import StoreError
from woodfisher_jax.pruning.masks import (
    apply_masks,
    init_masks,
    sparsity,
    sparsity_by_path,
)
from woodfisher_jax.pruning.methods import METHODS
from woodfisher_jax.pruning.needs import Needs
from woodfisher_jax.pruning.prune import PruneInfo, plan_pruning, prune
from woodfisher_jax.pruning.resources import MemoryLimitError

__all__ = [
    "METHODS",
    "CurvatureError",
    "MemoryLimitError",
    "Needs",
    "PruneInfo",
    "StoreError",
    "apply_masks",
    "blocks",
    "curvature",
    "fisher",
    "gradients",
    "init_masks",
    "masks",
    "obs",
    "plan_pruning",
    "prune",
    "schedules",
    "sparsity",
    "sparsity_by_path",
]
