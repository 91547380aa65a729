"""VGG networks with batch norm (Simonyan and Zisserman 2014, arXiv:1409.1556).

Names are torchvision's: ``params/features0/kernel`` is ``features.0.weight``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import (
    Resizable,
    conv_norm,
    flatten_channels_first,
    max_pool,
    width,
)

_CONVS_PER_STAGE = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}

_CHANNELS = (64, 128, 256, 512, 512)

DEPTHS = tuple(_CONVS_PER_STAGE)
"""The depths of the paper."""


class VGG(Resizable):
    """VGG-11, 13, 16 or 19 with batch norm, channels last.

    Attributes:
        depth: Number of layers with weights, one of `DEPTHS`.
        num_classes: Number of logits.
        dropout_rate: After each hidden dense layer in training; above zero, `apply`
            then needs a ``dropout`` key. PyTorch's has 0.5.
        dtype: Dtype of the computation; default that of the parameters.
    """

    depth: int = 16
    num_classes: int = 1000
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, H, W, 3] of 32 x 32 pixels or more to logits [B, classes]."""
        if self.depth not in _CONVS_PER_STAGE:
            allowed = ", ".join(map(str, DEPTHS))
            raise ValueError(f"depth: expected one of {allowed}, got {self.depth!r}")
        x = self._features(x, train)
        x = flatten_channels_first(adaptive_average_pool(x, 7))
        init = nn.initializers.normal(0.01)
        for place in (0, 3):
            name = f"classifier{place}"
            outputs = width(self, name, 4096)
            dense = nn.Dense(outputs, dtype=self.dtype, kernel_init=init, name=name)
            x = nn.relu(dense(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        # Without a dtype: float32 logits, since the parameters are.
        return nn.Dense(self.num_classes, kernel_init=init, name="classifier6")(x)

    def _features(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, 3] to [B, H / 32, W / 32, 512]."""
        # PyTorch counts convolutions, batch norms, ReLUs and pools alike.
        place = 0
        convs_per_stage = _CONVS_PER_STAGE[self.depth]
        for channels, num_convs in zip(_CHANNELS, convs_per_stage, strict=True):
            for _ in range(num_convs):
                x = conv_norm(
                    self,
                    x,
                    channels,
                    3,
                    use_bias=True,
                    names=(f"features{place}", f"features{place + 1}"),
                    train=train,
                    dtype=self.dtype,
                )
                x = nn.relu(x)
                place += 3
            x = max_pool(x, 2, stride=2)
            place += 1
        return x


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means over size x size windows that cover [B, H, W, C], whatever H and W are.

    Window i of n pixels is from floor(i n / size) up to ceil((i + 1) n / size), as in
    PyTorch; windows overlap where ``size`` does not divide n.

    Args:
        x: [B, H, W, C].
        size: Height and width of the result.

    Returns:
        [B, size, size, C].
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n == size:
            continue
        windows = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        means = [jax.lax.slice_in_dim(x, *w, axis=axis).mean(axis) for w in windows]
        x = jnp.stack(means, axis)
    return x
