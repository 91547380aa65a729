"""Residual networks for 32 x 32 images (He et al. 2015, section 4.2).

Three stages of n basic blocks with 16, 32 and 64 channels, so 6n + 2 layers. A variable
is found under names such as ``params/layer1/block0/conv1/kernel``.
"""

from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import batch_norm, conv, global_average_pool
from woodfisher_jax.models.resnet import Stage

DEPTHS = (20, 32, 44, 56, 110)
"""The depths of the paper; each is 6n + 2."""


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56 or 110, channels last.

    Attributes:
        depth: Number of layers, one of `DEPTHS`.
        num_classes: Number of logits.
        zero_init_residual: Whether the last batch norm of each block starts with a
            scale of 0 (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        dtype: Dtype of the computation, such as bfloat16; default that of the
            parameters. Parameters, batch statistics and logits are float32 anyway.
    """

    depth: int = 20
    num_classes: int = 10
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits.

        Args:
            x: Batch of images [B, H, W, 3].
            train: Whether batch norms use the batch's statistics (and update
                ``batch_stats``, which must then be mutable) or the stored ones.

        Returns:
            Logits [B, num_classes].

        Raises:
            ValueError: The depth is not one of `DEPTHS`.
        """
        if self.depth not in DEPTHS:
            allowed = ", ".join(map(str, DEPTHS))
            raise ValueError(
                f"depth: expected one of {allowed} (6n + 2), got {self.depth!r}"
            )
        num_blocks = (self.depth - 2) // 6
        stage = partial(
            Stage, zero_init_residual=self.zero_init_residual, dtype=self.dtype
        )

        x = conv(16, 3, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(batch_norm(train, dtype=self.dtype, name="bn1")(x))
        x = stage(16, num_blocks, name="layer1")(x, train)
        x = stage(32, num_blocks, stride=2, name="layer2")(x, train)
        x = stage(64, num_blocks, stride=2, name="layer3")(x, train)
        # Without a dtype: float32 logits, since the parameters are.
        return nn.Dense(self.num_classes, name="fc")(global_average_pool(x))
