"""Layers by the conventions of PyTorch's image models, channels last; their widths."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from woodfisher_jax.tracing.convolutions import convolution

he_normal_by_output = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with standard deviation sqrt(2 / (kernel height * kernel width * out))."""


class Resizable(nn.Module, kw_only=True):
    """A network of which each layer may have a width of its own.

    Attributes:
        widths: From the path of a layer, such as ``layer1/block0/conv1``, to its number
            of outputs, where that is not what the other attributes say; default none.
            A layer whose outputs are added to a shortcut, and a depthwise convolution,
            have as many as come in.
    """

    widths: Mapping[str, int] = FrozenDict()

    def __post_init__(self) -> None:
        """Makes the widths hashable, for a module may be a static argument of jit."""
        object.__setattr__(self, "widths", FrozenDict(self.widths))
        super().__post_init__()


def width(module: nn.Module, name: str, usual: int) -> int:
    """Outputs of a layer: what ``widths`` of the network has for it, or the usual.

    Args:
        module: The calling module, bound.
        name: Of the layer in it.
        usual: Outputs where the network, a `Resizable`, has none for its path.
    """
    network: Any = module
    while not isinstance(network, Resizable):
        network = getattr(network, "parent", None)
        if network is None:
            return usual
    path = module.path[len(network.path) :]
    return int(network.widths.get("/".join([*path, name]), usual))


def num_heads(
    module: nn.Module, name: str, usual: int, size: int, parts: int = 1
) -> int:
    """Heads of a projection, by its width.

    Args:
        module: The calling module, bound.
        name: Of the projection in it.
        usual: Heads where ``widths`` has nothing for it.
        size: Outputs of a head, the same whatever the width.
        parts: Projections in one, 3 for queries, keys and values together; default 1.

    Raises:
        ValueError: If the width is not that of whole heads.
    """
    outputs = width(module, name, parts * usual * size)
    if outputs % (parts * size):
        raise ValueError(
            f"widths[{'/'.join([*module.path, name])!r}]={outputs}; expected a "
            f"multiple of {parts * size}, whole heads"
        )
    return outputs // (parts * size)


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
        conv_general_dilated=convolution(),
        name=name,
    )


def conv_norm(
    module: nn.Module,
    x: jax.Array,
    channels: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    fixed: bool = False,
    use_bias: bool = False,
    zero_scale: bool = False,
    train: bool,
    dtype: DTypeLike | None,
    names: tuple[str, str],
) -> jax.Array:
    """Applies a convolution and a batch norm, as submodules of the calling module.

    Args:
        module: The calling module.
        x: [B, H, W, C].
        channels: Output channels, unless `width` says otherwise.
        size: Kernel height and width.
        stride: Stride in both directions; default 1.
        groups: Groups of channels; default 1. With more, and where ``fixed``, the
            output channels are ``channels`` in any case.
        fixed: Default False.
        use_bias: Whether the convolution has a bias; default False.
        zero_scale: Whether the norm's scale is initially 0; default 1.
        train: Whether the norm uses the batch's statistics and updates the stored ones.
        dtype: Dtype of the computation; None is that of the parameters.
        names: Of the convolution and of the norm.

    Returns:
        [B, H / stride, W / stride, channels].
    """
    if groups == 1 and not fixed:
        channels = width(module, names[0], channels)
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
