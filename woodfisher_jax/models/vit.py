"""Vision transformers (Dosovitskiy et al. 2020, arXiv:2010.11929).

Names are timm's: ``params/blocks0/attn/qkv/kernel`` is ``blocks.0.attn.qkv.weight``.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_truncated_normal = nn.initializers.truncated_normal(0.02)

_dense = partial(nn.Dense, kernel_init=_truncated_normal)

_layer_norm = partial(nn.LayerNorm, epsilon=1e-6)


class Attention(nn.Module):
    """Self-attention with ``num_heads`` heads, a divisor of the width."""

    num_heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        batch, tokens, width = x.shape
        qkv = _dense(3 * width, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value)
        y = y.reshape(batch, tokens, width)
        return _dense(width, dtype=self.dtype, name="proj")(y)


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between, four times as wide inside."""

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        width = x.shape[-1]
        x = _dense(4 * width, dtype=self.dtype, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return _dense(width, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut."""

    num_heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        attention = Attention(self.num_heads, self.dtype, name="attn")
        x = x + attention(_layer_norm(dtype=self.dtype, name="norm1")(x))
        mlp = Mlp(self.dtype, name="mlp")
        return x + mlp(_layer_norm(dtype=self.dtype, name="norm2")(x))


class VisionTransformer(nn.Module):
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
            x = Block(self.num_heads, self.dtype, name=f"blocks{number}")(x)
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
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.width,
            size,
            size,
            padding="VALID",
            dtype=self.dtype,
            name="patch_embed_proj",
        )(x)
        patches = patches.reshape(x.shape[0], -1, self.width)
        token = self.param("cls_token", _truncated_normal, (1, 1, self.width))
        shape = (1, 1 + patches.shape[1], self.width)
        position = self.param("pos_embed", _truncated_normal, shape)
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
        tokens = jnp.concatenate([token.astype(patches.dtype), patches], axis=1)
        return tokens + position.astype(patches.dtype)
