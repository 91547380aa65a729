"""A loss at masked weights, and the samples whose gradients are its rows."""

from typing import Any, NamedTuple

from jax.tree_util import Partial

from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.trees.blocks import FlatOrder
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params


class Problem(NamedTuple):
    """What a curvature is estimated from.

    Attributes:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree, pruned weights zero; shapes will do for planning.
        masks: What is pruned already, path -> bool.
        samples: One batch, or batches that can be read more than once; there are at
            least ``num_samples * batch_size`` examples.
        order: The flat order of the masked tensors.
        num_samples: N, gradients.
        batch_size: m, examples each gradient is the mean over.
        compute: What may be taken of the machine.
    """

    loss_fn: Partial
    params: Params
    masks: Masks
    samples: Any
    order: FlatOrder
    num_samples: int
    batch_size: int = 1
    compute: Compute = Compute()
