"""Residual networks for 32 x 32 images (He et al. 2015, section 4.2).

Three stages of n basic blocks with 16, 32 and 64 channels, so 6n + 2 layers. A variable
is found under names such as ``params/layer1/block0/conv1/kernel``.
"""

from functools import partial

import flax.linen as nn
import jax

DEPTHS = (20, 32, 44, 56, 110)
"""The depths of the paper; each is 6n + 2."""

# Flax's momentum is the share of the old mean, PyTorch's (0.1) that of the new one.
_batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)

# Normal with standard deviation sqrt(2 / (kernel height * kernel width * out)).
_conv = partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)

# "SAME" pads a stride-2 convolution on the right only; PyTorch pads both sides.
_conv3x3 = partial(_conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    Attributes:
        channels: Output channels.
        stride: Stride of the first convolution and of the shortcut. The shortcut has a
            1 x 1 convolution and a batch norm when it is not 1.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        strides = (self.stride, self.stride)
        norm = partial(_batch_norm, use_running_average=not train)

        y = _conv3x3(self.channels, strides=strides, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = _conv3x3(self.channels, name="conv2")(y)
        y = norm(name="bn2")(y)
        if self.stride != 1:
            x = _conv(
                self.channels,
                kernel_size=(1, 1),
                strides=strides,
                padding=((0, 0), (0, 0)),
                name="downsample_conv",
            )(x)
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class Stage(nn.Module):
    """Blocks ``block0``, ``block1``, ... of one width; only the first may stride.

    Attributes:
        channels: Output channels of every block.
        num_blocks: Number of blocks.
        stride: Stride of the first block.
    """

    channels: int
    num_blocks: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        for i in range(self.num_blocks):
            stride = self.stride if i == 0 else 1
            x = BasicBlock(self.channels, stride, name=f"block{i}")(x, train)
        return x


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56 or 110, channels last.

    Attributes:
        depth: Number of layers, one of `DEPTHS`.
        num_classes: Number of logits.
    """

    depth: int = 20
    num_classes: int = 10

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

        x = _conv3x3(16, name="conv1")(x)
        x = _batch_norm(use_running_average=not train, name="bn1")(x)
        x = nn.relu(x)
        x = Stage(16, num_blocks, name="layer1")(x, train)
        x = Stage(32, num_blocks, stride=2, name="layer2")(x, train)
        x = Stage(64, num_blocks, stride=2, name="layer3")(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="fc")(x)
