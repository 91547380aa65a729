"""Prune neural networks with second-order information (WoodFisher) in JAX.

``prune`` does it in one call; ``masked``, ``gradual`` and ``prune_masked`` do it in a
training loop of your own. Its steps are pure functions in ``gradients``,
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
    projections,
    schedules,
)
from woodfisher_jax.pruning.budget import MemoryLimitError
from woodfisher_jax.pruning.curvature import CurvatureError
from woodfisher_jax.pruning.disk import StoreError
from woodfisher_jax.pruning.masked import masked, masks_of, prune_masked, with_masks
from woodfisher_jax.pruning.masks import (
    apply_masks,
    init_masks,
    sparsity,
    sparsity_by_path,
)
from woodfisher_jax.pruning.methods import METHODS
from woodfisher_jax.pruning.needs import Needs
from woodfisher_jax.pruning.prune import PruneInfo, plan_pruning, prune
from woodfisher_jax.pruning.schedules import gradual

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
    "gradual",
    "init_masks",
    "masked",
    "masks",
    "masks_of",
    "obs",
    "plan_pruning",
    "projections",
    "prune",
    "prune_masked",
    "schedules",
    "sparsity",
    "sparsity_by_path",
    "with_masks",
]
