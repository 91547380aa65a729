"""Residual networks for ImageNet (He et al. 2015, arXiv:1512.03385).

Names are torchvision's: a variable is found under ``params/layer1/block0/conv1/kernel``
where PyTorch says ``layer1.0.conv1.weight``.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import batch_norm, conv, global_average_pool, max_pool


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    Attributes:
        channels: Output channels.
        stride: Stride of the first convolution and of the shortcut. The shortcut has a
            1 x 1 convolution and a batch norm when it changes the shape.
        zero_init_residual: Whether the last batch norm starts with a scale of 0, so
            that the block starts as its shortcut.
        dtype: Dtype of the computation; default that of the parameters.
    """

    channels: int
    stride: int = 1
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        dtype = self.dtype
        y = conv(self.channels, 3, self.stride, dtype=dtype, name="conv1")(x)
        y = nn.relu(batch_norm(train, dtype=dtype, name="bn1")(y))
        y = conv(self.channels, 3, dtype=dtype, name="conv2")(y)
        zero = self.zero_init_residual
        y = batch_norm(train, zero_scale=zero, dtype=dtype, name="bn2")(y)
        return nn.relu(_shortcut(x, self.channels, self.stride, train, dtype) + y)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 beside a shortcut.

    Attributes:
        channels: Output channels.
        inner_channels: Channels of the first two convolutions.
        stride: Stride of the 3 x 3 convolution and of the shortcut. The shortcut has a
            1 x 1 convolution and a batch norm when it changes the shape.
        zero_init_residual: Whether the last batch norm starts with a scale of 0, so
            that the block starts as its shortcut.
        dtype: Dtype of the computation; default that of the parameters.

    Note:
        The paper has the stride in the first convolution; torchvision (its "v1.5") and
        the original WoodFisher code have it in the 3 x 3 one.
    """

    channels: int
    inner_channels: int
    stride: int = 1
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        dtype = self.dtype
        y = conv(self.inner_channels, 1, dtype=dtype, name="conv1")(x)
        y = nn.relu(batch_norm(train, dtype=dtype, name="bn1")(y))
        y = conv(self.inner_channels, 3, self.stride, dtype=dtype, name="conv2")(y)
        y = nn.relu(batch_norm(train, dtype=dtype, name="bn2")(y))
        y = conv(self.channels, 1, dtype=dtype, name="conv3")(y)
        zero = self.zero_init_residual
        y = batch_norm(train, zero_scale=zero, dtype=dtype, name="bn3")(y)
        return nn.relu(_shortcut(x, self.channels, self.stride, train, dtype) + y)


def _shortcut(
    x: jax.Array, channels: int, stride: int, train: bool, dtype: DTypeLike | None
) -> jax.Array:
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = conv(channels, 1, stride, dtype=dtype, name="downsample_conv")(x)
    return batch_norm(train, dtype=dtype, name="downsample_bn")(x)


class Stage(nn.Module):
    """Blocks ``block0``, ``block1``, ... of one width; only the first may stride.

    Attributes:
        channels: Output channels of every block.
        num_blocks: Number of blocks.
        stride: Stride of the first block.
        inner_channels: Of bottlenecks; basic blocks, the default, have none.
        zero_init_residual: See the blocks.
        dtype: Dtype of the computation; default that of the parameters.
    """

    channels: int
    num_blocks: int
    stride: int = 1
    inner_channels: int | None = None
    zero_init_residual: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        for i in range(self.num_blocks):
            x = self._block(i)(x, train)
        return x

    def _block(self, number: int) -> nn.Module:
        stride = self.stride if number == 0 else 1
        rest = (stride, self.zero_init_residual, self.dtype)
        if self.inner_channels is None:
            return BasicBlock(self.channels, *rest, name=f"block{number}")
        return Bottleneck(
            self.channels, self.inner_channels, *rest, name=f"block{number}"
        )


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
"""The depths of the paper."""


class ResNet(nn.Module):
    """ResNet-18, 34, 50, 101 or 152, or a wide one; channels last.

    From ResNet-50 on, blocks are bottlenecks. WideResNet-50-2 (Zagoruyko and Komodakis
    2016, arXiv:1605.07146) has ``depth=50`` and ``widening=2``.

    Attributes:
        depth: Number of layers, one of `DEPTHS`.
        num_classes: Number of logits.
        widening: Factor of the channels inside bottlenecks; 1 without bottlenecks.
        zero_init_residual: Whether the last batch norm of each block starts with a
            scale of 0 (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        dtype: Dtype of the computation, such as bfloat16; default that of the
            parameters. Parameters, batch statistics and logits are float32 anyway.
    """

    depth: int = 50
    num_classes: int = 1000
    widening: int = 1
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
            ValueError: The depth is not one of `DEPTHS`, or has no wide form.
        """
        form = self._form()
        x = conv(64, 7, stride=2, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(batch_norm(train, dtype=self.dtype, name="bn1")(x))
        x = max_pool(x, 3, stride=2, padding=1)
        for number, num_blocks in enumerate(form.num_blocks, start=1):
            width = 64 * 2 ** (number - 1)
            x = Stage(
                channels=4 * width if form.bottleneck else width,
                num_blocks=num_blocks,
                stride=1 if number == 1 else 2,
                inner_channels=self.widening * width if form.bottleneck else None,
                zero_init_residual=self.zero_init_residual,
                dtype=self.dtype,
                name=f"layer{number}",
            )(x, train)
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
