"""Residual networks (He et al. 2015, arXiv:1512.03385).

Names are torchvision's: ``params/layer1/block0/conv1/kernel`` is
``layer1.0.conv1.weight``.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import (
    Resizable,
    conv_norm,
    global_average_pool,
    max_pool,
)

CIFAR_DEPTHS = (20, 32, 44, 56, 110)
"""The paper's depths for 32 x 32 images (section 4.2); each is 6n + 2."""


class _Form(NamedTuple):
    num_blocks: tuple[int, ...]
    bottleneck: bool


_FORMS = {
    18: _Form((2, 2, 2, 2), bottleneck=False),
    34: _Form((3, 4, 6, 3), bottleneck=False),
    50: _Form((3, 4, 6, 3), bottleneck=True),
    101: _Form((3, 4, 23, 3), bottleneck=True),
    152: _Form((3, 8, 36, 3), bottleneck=True),
}

DEPTHS = tuple(_FORMS)
"""The paper's depths for ImageNet (table 1)."""


class ResidualBlock(nn.Module):
    """Convolutions ``conv1``, ``conv2``, ... with batch norms, beside a shortcut.

    Attributes:
        channels: Output channels of each convolution: two of 3 x 3 (a basic block) or
            three of 1 x 1, 3 x 3 and 1 x 1 (a bottleneck).
        stride: Stride of the first 3 x 3 convolution and of the shortcut. The shortcut
            has a 1 x 1 convolution and a batch norm where it changes the shape.
        zero_init_residual: Whether the last batch norm has an initial scale of 0, so
            that the block is initially its shortcut.
        dtype: Dtype of the computation; default that of the parameters.
        inputs: Channels of the input where no layer has another width, which decide
            whether the shape changes; default those that come.

    Note:
        A bottleneck has its stride in the 3 x 3 convolution, as in torchvision (its
        "v1.5") and in the original WoodFisher code; the paper has it in the first one.
    """

    channels: tuple[int, ...]
    stride: int = 1
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None
    inputs: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels[-1]]."""
        apply = partial(conv_norm, self, train=train, dtype=self.dtype)
        inputs = self.inputs or x.shape[-1]
        project = self.stride != 1 or inputs != self.channels[-1]
        # What is added to the input as it is has its channels.
        outputs = self.channels[-1] if project else x.shape[-1]
        last = partial(apply, fixed=not project, zero_scale=self.zero_init_residual)
        if len(self.channels) == 2:
            inside, _ = self.channels
            y = nn.relu(apply(x, inside, 3, self.stride, names=("conv1", "bn1")))
            y = last(y, outputs, 3, names=("conv2", "bn2"))
        else:
            first, inside, _ = self.channels
            y = nn.relu(apply(x, first, 1, names=("conv1", "bn1")))
            y = nn.relu(apply(y, inside, 3, self.stride, names=("conv2", "bn2")))
            y = last(y, outputs, 1, names=("conv3", "bn3"))
        if project:
            names = ("downsample_conv", "downsample_bn")
            x = apply(x, y.shape[-1], 1, self.stride, fixed=True, names=names)
        return nn.relu(x + y)


class Stage(nn.Module):
    """Blocks ``block0``, ``block1``, ... of one width; only the first has the stride.

    Attributes:
        num_blocks: Number of blocks.
        channels, stride, zero_init_residual, dtype, inputs: See `ResidualBlock`.
    """

    num_blocks: int
    channels: tuple[int, ...]
    stride: int
    zero_init_residual: bool
    dtype: DTypeLike | None
    inputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels[-1]]."""
        for i in range(self.num_blocks):
            x = ResidualBlock(
                self.channels,
                self.stride if i == 0 else 1,
                self.zero_init_residual,
                self.dtype,
                self.inputs if i == 0 else self.channels[-1],
                name=f"block{i}",
            )(x, train)
        return x


class ResNet(Resizable):
    """ResNet-18, 34, 50, 101 or 152, or a wide one; channels last.

    From ResNet-50 on, blocks are bottlenecks. WideResNet-50-2 (Zagoruyko and Komodakis
    2016, arXiv:1605.07146) has ``depth=50`` and ``widening=2``.

    Attributes:
        depth: Number of layers, one of `DEPTHS`.
        num_classes: Number of logits.
        widening: Factor of the channels inside bottlenecks; 1 without bottlenecks.
        zero_init_residual: Whether the last batch norm of each block has an initial
            scale of 0 (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        dtype: Dtype of the computation; default that of the parameters.
    """

    depth: int = 50
    num_classes: int = 1000
    widening: int = 1
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, H, W, 3] to logits [B, num_classes]."""
        form = self._form()
        names = ("conv1", "bn1")
        x = conv_norm(self, x, 64, 7, 2, names=names, train=train, dtype=self.dtype)
        x = max_pool(nn.relu(x), 3, stride=2, padding=1)
        inputs = 64
        for i, num_blocks in enumerate(form.num_blocks):
            width = 64 * 2**i
            inside = self.widening * width
            channels = (inside, inside, 4 * width) if form.bottleneck else (width,) * 2
            x = Stage(
                num_blocks,
                channels,
                1 if i == 0 else 2,
                self.zero_init_residual,
                self.dtype,
                inputs,
                name=f"layer{i + 1}",
            )(x, train)
            inputs = channels[-1]
        # Without a dtype: float32 logits, since the parameters are.
        return nn.Dense(self.num_classes, name="fc")(global_average_pool(x))

    def _form(self) -> _Form:
        if self.depth not in _FORMS:
            allowed = ", ".join(map(str, DEPTHS))
            raise ValueError(f"depth: expected one of {allowed}, got {self.depth!r}")
        form = _FORMS[self.depth]
        if self.widening != 1 and not form.bottleneck:
            raise ValueError(
                f"widening: expected 1, since ResNet-{self.depth} has no bottlenecks, "
                f"got {self.widening!r}"
            )
        return form


class CifarResNet(Resizable):
    """ResNet-20, 32, 44, 56 or 110 for 32 x 32 images, channels last.

    Three stages of n basic blocks with 16, 32 and 64 channels, so 6n + 2 layers.

    Attributes:
        depth: Number of layers, one of `CIFAR_DEPTHS`.
        num_classes: Number of logits.
        zero_init_residual: As for `ResNet`.
        dtype: Dtype of the computation; default that of the parameters.
    """

    depth: int = 20
    num_classes: int = 10
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, H, W, 3] to logits [B, num_classes]."""
        if self.depth not in CIFAR_DEPTHS:
            allowed = ", ".join(map(str, CIFAR_DEPTHS))
            raise ValueError(
                f"depth: expected one of {allowed} (6n + 2), got {self.depth!r}"
            )
        names = ("conv1", "bn1")
        x = conv_norm(self, x, 16, 3, names=names, train=train, dtype=self.dtype)
        x = nn.relu(x)
        num_blocks = (self.depth - 2) // 6
        rest = (self.zero_init_residual, self.dtype)
        x = Stage(num_blocks, (16, 16), 1, *rest, 16, name="layer1")(x, train)
        x = Stage(num_blocks, (32, 32), 2, *rest, 16, name="layer2")(x, train)
        x = Stage(num_blocks, (64, 64), 2, *rest, 32, name="layer3")(x, train)
        # Without a dtype: float32 logits, since the parameters are.
        return nn.Dense(self.num_classes, name="fc")(global_average_pool(x))
