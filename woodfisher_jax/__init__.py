"""Prune neural networks with second-order information (WoodFisher) in JAX.

``prune`` does it in one call, ``prune_matched`` in stages without labels; ``masked``,
``gradual`` and ``prune_masked`` do it in a training loop of your own. The steps are
pure functions in ``gradients``, ``blocks``, ``fisher`` (one block), ``curvature``
(many), ``obs`` (statistics and updates), ``masks`` and ``schedules``.
"""

from woodfisher_jax import batch_norm, curvature, schedules
from woodfisher_jax.curvature.checked import CurvatureError
from woodfisher_jax.curvature.diagonal import DiagonalFisher, DiagonalHessian
from woodfisher_jax.curvature.fisher import WoodFisher
from woodfisher_jax.curvature.kronecker import Kronecker
from woodfisher_jax.curvature.method import (
    Built,
    Diagonal,
    Magnitude,
    Method,
    Sampled,
    Scores,
    ready,
)
from woodfisher_jax.equations import fisher, obs
from woodfisher_jax.info import PruneInfo, PruneWarning
from woodfisher_jax.layerwise.prune import prune_layerwise
from woodfisher_jax.masked import masked, masks_of, prune_masked, with_masks
from woodfisher_jax.methods import METHODS
from woodfisher_jax.options import OptionError, option
from woodfisher_jax.prune import plan_pruning, prune
from woodfisher_jax.rows import gradients, projections
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.rows.disk import StoreError
from woodfisher_jax.rows.gradients import gradient_rows
from woodfisher_jax.rows.memory_plan import MemoryLimitError
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.schedules import gradual
from woodfisher_jax.selection import patterns
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.selection.structures import structures
from woodfisher_jax.shrink import shrink, shrunk
from woodfisher_jax.stages import matching
from woodfisher_jax.stages.damping_search import prune_searched
from woodfisher_jax.stages.matching import prune_matched
from woodfisher_jax.stages.outputs import prune_outputs
from woodfisher_jax.step import Step, step
from woodfisher_jax.tracing.axes import find_axes
from woodfisher_jax.trees import axes, blocks, masks
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.masks import (
    apply_masks,
    masks_tree,
    sparsity,
    sparsity_by_path,
)
from woodfisher_jax.trees.prunable import init_masks
from woodfisher_jax.weights import sparse_files

# The only place, which the build reads too: so it is that of the code that runs, in a
# checkout that is not installed or beside an installed copy of another version.
__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Built",
    "Compute",
    "CurvatureError",
    "Diagonal",
    "DiagonalFisher",
    "DiagonalHessian",
    "Goal",
    "Kronecker",
    "Magnitude",
    "MemoryLimitError",
    "Method",
    "Needs",
    "OptionError",
    "Problem",
    "PruneInfo",
    "PruneWarning",
    "Sampled",
    "Scores",
    "Step",
    "StoreError",
    "WeightAxes",
    "WoodFisher",
    "__version__",
    "apply_masks",
    "axes",
    "batch_norm",
    "blocks",
    "curvature",
    "find_axes",
    "fisher",
    "gradient_rows",
    "gradients",
    "gradual",
    "init_masks",
    "masked",
    "masks",
    "masks_of",
    "masks_tree",
    "matching",
    "obs",
    "option",
    "patterns",
    "plan_pruning",
    "projections",
    "prune",
    "prune_layerwise",
    "prune_masked",
    "prune_matched",
    "prune_outputs",
    "prune_searched",
    "ready",
    "schedules",
    "shrink",
    "shrunk",
    "sparse_files",
    "sparsity",
    "sparsity_by_path",
    "step",
    "structures",
    "with_masks",
]
