"""Layers by the conventions of PyTorch's image models, channels last."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

he_normal_by_output = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with standard deviation sqrt(2 / (kernel height * kernel width * out))."""


def conv(
    channels: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    dtype: DTypeLike | None = None,
    name: str,
) -> nn.Conv:
    """A convolution of odd size that divides height and width by its stride.

    Args:
        channels: Output channels.
        size: Kernel height and width.
        stride: Stride in both directions; default 1.
        groups: Groups of channels; default 1. As many as channels is depthwise.
        use_bias: Whether it has a bias, initially zero; default False.
        dtype: Dtype of the computation; default that of the parameters.
        name: The submodule's name.
    """
    # Not "SAME", which pads a stride-2 convolution on the right only.
    padding = (size // 2, size // 2)
    return nn.Conv(
        channels,
        (size, size),
        (stride, stride),
        padding=(padding, padding),
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=he_normal_by_output,
        name=name,
    )


def conv_norm(
    x: jax.Array,
    channels: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    zero_scale: bool = False,
    train: bool,
    dtype: DTypeLike | None,
    names: tuple[str, str],
) -> jax.Array:
    """Applies a convolution and a batch norm, as submodules of the calling module.

    Args:
        x: [B, H, W, C].
        channels: Output channels.
        size: Kernel height and width.
        stride: Stride in both directions; default 1.
        groups: Groups of channels; default 1.
        use_bias: Whether the convolution has a bias; default False.
        zero_scale: Whether the norm's scale is initially 0; default 1.
        train: Whether the norm uses the batch's statistics and updates the stored ones.
        dtype: Dtype of the computation; None is that of the parameters.
        names: Of the convolution and of the norm.

    Returns:
        [B, H / stride, W / stride, channels].
    """
    layer = conv(
        channels,
        size,
        stride,
        groups=groups,
        use_bias=use_bias,
        dtype=dtype,
        name=names[0],
    )
    norm = nn.BatchNorm(
        use_running_average=not train,
        # The share of the old mean; PyTorch's momentum (0.1) is that of the new one.
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
        name=names[1],
    )
    return norm(layer(x))


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Largest value of each size x size window of [B, H, W, C], padded with -inf."""
    padded = ((padding, padding), (padding, padding))
    pooled = nn.max_pool(x, (size, size), (stride, stride), padded)
    assert isinstance(pooled, jax.Array)
    return pooled


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over the pixels: [B, H, W, C] to [B, C]."""
    return jnp.mean(x, axis=(1, 2))


def flatten_channels_first(x: jax.Array) -> jax.Array:
    """Flattens [B, H, W, C] to [B, C * H * W], the order of PyTorch's dense layers."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
