"""The small convolutional network of the original WoodFisher code for CIFAR-10."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import (
    Resizable,
    conv,
    flatten_channels_first,
    max_pool,
    width,
)


class CifarNet(Resizable):
    """Three 5 x 5 convolutions, each with a pool, and two dense layers.

    Attributes:
        num_classes: Number of logits.
        dtype: Dtype of the computation; default that of the parameters.
    """

    num_classes: int = 10
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, 32, 32, 3] to logits [B, num_classes]."""

        def apply(name: str, channels: int, x: jax.Array) -> jax.Array:
            outputs = width(self, name, channels)
            return conv(outputs, 5, use_bias=True, dtype=self.dtype, name=name)(x)

        x = nn.relu(max_pool(apply("conv1", 32, x), 3, stride=2))
        x = nn.avg_pool(nn.relu(apply("conv2", 32, x)), (3, 3), (2, 2))
        x = nn.avg_pool(nn.relu(apply("conv3", 64, x)), (3, 3), (2, 2))
        dense = nn.Dense(width(self, "fc1", 64), dtype=self.dtype, name="fc1")
        x = dense(flatten_channels_first(x))
        return nn.Dense(self.num_classes, name="fc2")(nn.relu(x))
