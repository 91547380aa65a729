"""MobileNets: convolutions split into one for each channel and one across channels.

The names of version 1 are those of the STR checkpoints (github.com/RAIVNLab/STR), from
which the WoodFisher paper prunes; those of version 2 are torchvision's.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import batch_norm, conv, global_average_pool

_V1_BLOCKS = (
    # channels, stride
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)

_V2_STAGES = (
    # expansion, channels, number of blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvBlock(nn.Module):
    """A convolution, batch norm and an activation.

    Attributes:
        channels: Output channels.
        size: Kernel height and width.
        stride: Stride of the convolution.
        groups: Groups of channels.
        activation: Function of an array.
        dtype: Dtype of the computation; default that of the parameters.
    """

    channels: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] = nn.relu6
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        x = conv(
            self.channels,
            self.size,
            self.stride,
            groups=self.groups,
            dtype=self.dtype,
            name="conv_0",
        )(x)
        return self.activation(batch_norm(train, dtype=self.dtype, name="bn_1")(x))


class SeparableBlock(nn.Module):
    """A 3 x 3 convolution of each channel, then a 1 x 1 convolution across them.

    Batch norm and ReLU follow each of the two.

    Attributes:
        channels: Output channels.
        stride: Stride of the depthwise convolution.
        dtype: Dtype of the computation; default that of the parameters.
    """

    channels: int
    stride: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        before, dtype = x.shape[-1], self.dtype
        x = conv(
            before, 3, self.stride, groups=before, dtype=dtype, name="depthwise_0"
        )(x)
        x = nn.relu(batch_norm(train, dtype=dtype, name="bn_1")(x))
        x = conv(self.channels, 1, dtype=dtype, name="pointwise_3")(x)
        return nn.relu(batch_norm(train, dtype=dtype, name="bn_4")(x))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) of width 1, channels last.

    Attributes:
        num_classes: Number of logits.
        dtype: Dtype of the computation, such as bfloat16; default that of the
            parameters. Parameters, batch statistics and logits are float32 anyway.
    """

    num_classes: int = 1000
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
        """
        stem = ConvBlock(
            32, stride=2, activation=nn.relu, dtype=self.dtype, name="model0"
        )
        x = stem(x, train)
        for number, (channels, stride) in enumerate(_V1_BLOCKS, start=1):
            block = SeparableBlock(channels, stride, self.dtype, name=f"model{number}")
            x = block(x, train)
        # Without a dtype: float32 logits, since the parameters are.
        return nn.Dense(self.num_classes, name="fc")(global_average_pool(x))


class InvertedResidual(nn.Module):
    """A block that is wide inside: 1 x 1, depthwise 3 x 3 and linear 1 x 1 convolution.

    The input is added where the shape allows it.

    Attributes:
        channels: Output channels.
        expansion: Factor of the channels inside; without the first convolution if 1.
        stride: Stride of the depthwise convolution.
        dtype: Dtype of the computation; default that of the parameters.
    """

    channels: int
    expansion: int
    stride: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        branch = _InvertedBranch(
            self.channels, self.expansion, self.stride, self.dtype, name="conv"
        )
        y = branch(x, train)
        return x + y if x.shape == y.shape else y


class _InvertedBranch(nn.Module):
    """An inverted residual without the shortcut, named ``conv`` in PyTorch."""

    channels: int
    expansion: int
    stride: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype = self.dtype
        inside = self.expansion * x.shape[-1]
        place = 0
        if self.expansion != 1:
            x = ConvBlock(inside, size=1, dtype=dtype, name="expand_0")(x, train)
            place = 1
        x = ConvBlock(
            inside,
            stride=self.stride,
            groups=inside,
            dtype=dtype,
            name=f"depthwise_{place}",
        )(x, train)
        x = conv(self.channels, 1, dtype=dtype, name=f"project_{place + 1}")(x)
        return batch_norm(train, dtype=dtype, name=f"bn_{place + 2}")(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) of width 1, channels last.

    Attributes:
        num_classes: Number of logits.
        dropout_rate: Of the features in training; above zero, `apply` then needs a
            ``dropout`` key. PyTorch's has 0.2.
        dtype: Dtype of the computation, such as bfloat16; default that of the
            parameters. Parameters, batch statistics and logits are float32 anyway.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.0
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
        """
        x = ConvBlock(32, stride=2, dtype=self.dtype, name="features0")(x, train)
        number = 1
        for expansion, channels, num_blocks, first_stride in _V2_STAGES:
            for i in range(num_blocks):
                block = InvertedResidual(
                    channels,
                    expansion,
                    stride=first_stride if i == 0 else 1,
                    dtype=self.dtype,
                    name=f"features{number}",
                )
                x = block(x, train)
                number += 1
        last = ConvBlock(1280, size=1, dtype=self.dtype, name=f"features{number}")
        x = global_average_pool(last(x, train))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, name="classifier1")(x)
