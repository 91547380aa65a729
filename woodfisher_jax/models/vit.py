"""Vision transformers (Dosovitskiy et al. 2020, arXiv:2010.11929).

Names are timm's: ``params/blocks0/attn/qkv/kernel`` is ``blocks.0.attn.qkv.weight``.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from woodfisher_jax.models.layers import Resizable, num_heads, width

_truncated_normal = nn.initializers.truncated_normal(0.02)

_dense = partial(nn.Dense, kernel_init=_truncated_normal)

_layer_norm = partial(nn.LayerNorm, epsilon=1e-6)


class Attention(nn.Module):
    """Self-attention with ``num_heads`` heads of ``head_width``."""

    num_heads: int
    head_width: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        size = self.head_width
        heads = num_heads(self, "qkv", self.num_heads, size, parts=3)
        qkv = _dense(3 * heads * size, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, heads, size)
        query, key, value = (qkv[:, :, i] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value)
        y = y.reshape(*x.shape[:2], heads * size)
        return _dense(x.shape[-1], dtype=self.dtype, name="proj")(y)


class Mlp(nn.Module):
    """Two dense layers, ``inside`` wide, with an exact GELU between."""

    inside: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        inside = width(self, "fc1", self.inside)
        y = nn.gelu(_dense(inside, dtype=self.dtype, name="fc1")(x), approximate=False)
        return _dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut.

    Attributes:
        width: Of a token, of which the sizes of both layers follow.
        num_heads: A divisor of the width.
        dtype: Dtype of the computation; default that of the parameters.
    """

    width: int
    num_heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        head_width = self.width // self.num_heads
        attention = Attention(self.num_heads, head_width, self.dtype, name="attn")
        x = x + attention(_layer_norm(dtype=self.dtype, name="norm1")(x))
        mlp = Mlp(4 * self.width, self.dtype, name="mlp")
        return x + mlp(_layer_norm(dtype=self.dtype, name="norm2")(x))


class VisionTransformer(Resizable):
    """A vision transformer that classifies by a class token; channels last.

    With 12 blocks and patches of 16 x 16 pixels it is DeiT (Touvron et al. 2020,
    arXiv:2012.12877, without distillation): Tiny has width 192 and 3 heads, Small 384
    and 6, Base 768 and 12. It has neither dropout nor stochastic depth.

    Attributes:
        width: Length of a token.
        num_heads: Number of attention heads, a divisor of the width.
        depth: Number of blocks.
        patch_size: Height and width of a patch in pixels, a divisor of the image's.
        num_classes: Number of logits.
        dtype: Dtype of the computation; default that of the parameters.
    """

    width: int = 384
    num_heads: int = 6
    depth: int = 12
    patch_size: int = 16
    num_classes: int = 1000
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [B, H, W, 3], of the size at `init`, to logits [B, classes]."""
        self._check(x)
        x = self._embed(x)
        for number in range(self.depth):
            name = f"blocks{number}"
            x = Block(self.width, self.num_heads, self.dtype, name=name)(x)
        x = _layer_norm(dtype=self.dtype, name="norm")(x)
        # Without a dtype: float32 logits, since the parameters are.
        return _dense(self.num_classes, name="head")(x[:, 0])

    def _check(self, x: jax.Array) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of the width {self.width}, "
                f"got {self.num_heads}"
            )
        height, width = x.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images: expected height and width to be multiples of patch_size="
                f"{self.patch_size}, got {height} x {width}"
            )

    def _embed(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, 3] to the class token and the patches, [B, 1 + P, width]."""
        size, name = (self.patch_size, self.patch_size), "patch_embed_proj"
        length = width(self, name, self.width)
        patches = nn.Conv(
            length, size, size, padding="VALID", dtype=self.dtype, name=name
        )(x)
        patches = patches.reshape(x.shape[0], -1, length)
        token = self.param("cls_token", _truncated_normal, (1, 1, length))
        shape = (1, 1 + patches.shape[1], length)
        position = self.param("pos_embed", _truncated_normal, shape)
        token = jnp.broadcast_to(token, (x.shape[0], 1, length))
        tokens = jnp.concatenate([token.astype(patches.dtype), patches], axis=1)
        return tokens + position.astype(patches.dtype)
