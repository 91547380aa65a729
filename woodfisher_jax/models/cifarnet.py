"""The small convolutional network of the original WoodFisher code for CIFAR-10."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import conv, flatten_channels_first, max_pool


class CifarNet(nn.Module):
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
        dtype = self.dtype
        x = conv(32, 5, use_bias=True, dtype=dtype, name="conv1")(x)
        x = nn.relu(max_pool(x, 3, stride=2))
        x = conv(32, 5, use_bias=True, dtype=dtype, name="conv2")(x)
        x = nn.avg_pool(nn.relu(x), (3, 3), (2, 2))
        x = conv(64, 5, use_bias=True, dtype=dtype, name="conv3")(x)
        x = nn.avg_pool(nn.relu(x), (3, 3), (2, 2))
        x = nn.Dense(64, dtype=dtype, name="fc1")(flatten_channels_first(x))
        return nn.Dense(self.num_classes, name="fc2")(nn.relu(x))
