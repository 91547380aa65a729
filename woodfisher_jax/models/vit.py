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
    """Self-attention of several heads.

    Attributes:
        num_heads: Number of heads; it divides the width.
        dtype: Dtype of the computation; default that of the parameters.
    """

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
    """Two dense layers with an exact GELU between, four times as wide inside.

    Attributes:
        dtype: Dtype of the computation; default that of the parameters.
    """

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        width = x.shape[-1]
        x = _dense(4 * width, dtype=self.dtype, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return _dense(width, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut.

    Attributes:
        num_heads: Number of heads; it divides the width.
        dtype: Dtype of the computation; default that of the parameters.
    """

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
    and 6, Base 768 and 12. Dropout and stochastic depth are left out.

    Attributes:
        width: Length of a token.
        num_heads: Number of attention heads; it divides the width.
        depth: Number of blocks.
        patch_size: Height and width of a patch in pixels.
        num_classes: Number of logits.
        dtype: Dtype of the computation, such as bfloat16; default that of the
            parameters. Parameters and logits are float32 anyway.
    """

    width: int = 384
    num_heads: int = 6
    depth: int = 12
    patch_size: int = 16
    num_classes: int = 1000
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits.

        Args:
            x: Batch of images [B, H, W, 3], always of the size the parameters were
                initialised with.
            train: Ignored, as no layer behaves differently in training; here so that
                every model is called alike.

        Returns:
            Logits [B, num_classes].

        Raises:
            ValueError: The heads do not divide the width, or the patches the image.
        """
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
        first = self.param("cls_token", _truncated_normal, (1, 1, self.width))
        places = (1, 1 + patches.shape[1], self.width)
        position = self.param("pos_embed", _truncated_normal, places)
        first = jnp.broadcast_to(first, (x.shape[0], 1, self.width))
        tokens = jnp.concatenate([first.astype(patches.dtype), patches], axis=1)
        return tokens + position.astype(patches.dtype)
