"""MobileNets: convolutions split into one for each channel and one across channels.

The names of version 1 are those of the STR checkpoints (github.com/RAIVNLab/STR), from
which the WoodFisher paper prunes; those of version 2 are torchvision's.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import Resizable, conv_norm, global_average_pool

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
        channels, size, stride, groups: See `conv_norm`.
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
        x = conv_norm(
            self,
            x,
            self.channels,
            self.size,
            self.stride,
            groups=self.groups,
            names=("conv_0", "bn_1"),
            train=train,
            dtype=self.dtype,
        )
        return self.activation(x)


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
        apply = partial(conv_norm, self, train=train, dtype=self.dtype)
        inputs, names = x.shape[-1], ("depthwise_0", "bn_1")
        x = nn.relu(apply(x, inputs, 3, self.stride, groups=inputs, names=names))
        return nn.relu(apply(x, self.channels, 1, names=("pointwise_3", "bn_4")))


class MobileNetV1(Resizable):
    """MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) of width 1, channels last.

    Attributes:
        num_classes: Number of logits.
        dtype: Dtype of the computation; default that of the parameters.
    """

    num_classes: int = 1000
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, H, W, 3] to logits [B, num_classes]."""
        dtype = self.dtype
        stem = ConvBlock(32, stride=2, activation=nn.relu, dtype=dtype, name="model0")
        x = stem(x, train)
        for number, (channels, stride) in enumerate(_V1_BLOCKS, start=1):
            block = SeparableBlock(channels, stride, dtype, name=f"model{number}")
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
        inputs: Channels of the input where no layer has another width; default those
            that come.
    """

    channels: int
    expansion: int
    stride: int = 1
    dtype: DTypeLike | None = None
    inputs: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        inputs = self.inputs or x.shape[-1]
        adds = self.stride == 1 and inputs == self.channels
        branch = _InvertedBranch(
            self.channels,
            self.expansion,
            self.stride,
            self.dtype,
            inputs,
            adds,
            name="conv",
        )
        y = branch(x, train)
        return x + y if adds else y


class _InvertedBranch(nn.Module):
    """An inverted residual without the shortcut, named ``conv`` in PyTorch."""

    channels: int
    expansion: int
    stride: int
    dtype: DTypeLike | None
    inputs: int
    adds: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # What is added to the input has its channels.
        outputs = x.shape[-1] if self.adds else self.channels
        # The place in PyTorch's sequence, which begins with the expansion if any.
        place = 0
        if self.expansion != 1:
            inside = self.expansion * self.inputs
            expand = ConvBlock(inside, size=1, dtype=self.dtype, name="expand_0")
            x = expand(x, train)
            place = 1
        inside = x.shape[-1]
        x = ConvBlock(
            inside,
            stride=self.stride,
            groups=inside,
            dtype=self.dtype,
            name=f"depthwise_{place}",
        )(x, train)
        names = (f"project_{place + 1}", f"bn_{place + 2}")
        return conv_norm(
            self,
            x,
            outputs,
            1,
            fixed=self.adds,
            names=names,
            train=train,
            dtype=self.dtype,
        )


class MobileNetV2(Resizable):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) of width 1, channels last.

    Attributes:
        num_classes: Number of logits.
        dropout_rate: Of the features in training; above zero, `apply` then needs a
            ``dropout`` key. PyTorch's has 0.2.
        dtype: Dtype of the computation; default that of the parameters.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, H, W, 3] to logits [B, num_classes]."""
        dtype = self.dtype
        x = ConvBlock(32, stride=2, dtype=dtype, name="features0")(x, train)
        number, inputs = 1, 32
        for expansion, channels, num_blocks, stride in _V2_STAGES:
            for i in range(num_blocks):
                x = InvertedResidual(
                    channels,
                    expansion,
                    stride if i == 0 else 1,
                    dtype,
                    inputs,
                    name=f"features{number}",
                )(x, train)
                number, inputs = number + 1, channels
        x = ConvBlock(1280, size=1, dtype=dtype, name=f"features{number}")(x, train)
        x = global_average_pool(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, name="classifier1")(x)
