"""Encoders of BERT's form (Devlin et al. 2018, arXiv:1810.04805).

Names are Hugging Face's: ``params/encoder/layer_0/attention/self/query/kernel`` is
``encoder.layer.0.attention.self.query.weight``.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from woodfisher_jax.options import Options, option

_normal = nn.initializers.normal(0.02)

_dense = partial(nn.Dense, kernel_init=_normal)


@dataclasses.dataclass(frozen=True)
class BertConfig(Options):
    """Sizes of an encoder; names and defaults are Hugging Face's."""

    vocab_size: int = option(30522, "Tokens there are.", least=1)
    hidden_size: int = option(768, "Width of a token.", least=1)
    num_hidden_layers: int = option(12, "Blocks.", least=1)
    intermediate_size: int = option(3072, "Width inside the perceptron.", least=1)
    num_attention_heads: int = option(
        12, "Heads of attention, a divisor of the width.", least=1
    )
    max_position_embeddings: int = option(512, "Most tokens of a sequence.", least=1)
    type_vocab_size: int = option(2, "Kinds of segments.", least=1)
    layer_norm_eps: float = option(1e-12, "Added to the variance.", above=0)

    def __post_init__(self) -> None:
        """Checks the heads.

        Raises:
            ValueError: If they do not divide the width.
        """
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}; expected a divisor "
                f"of hidden_size={self.hidden_size}"
            )


class Embeddings(nn.Module):
    """The sum of a word's, a position's and a segment's vector, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        """Maps tokens and types [B, T] to [B, T, width]."""
        c = self.config

        def table(name: str, number: int) -> nn.Embed:
            return nn.Embed(number, c.hidden_size, embedding_init=_normal, name=name)

        length = tokens.shape[1]
        if length > c.max_position_embeddings:
            raise ValueError(
                f"tokens: expected sequences of at most max_position_embeddings="
                f"{c.max_position_embeddings}, got {length}"
            )
        x = table("word_embeddings", c.vocab_size)(tokens)
        positions = table("position_embeddings", c.max_position_embeddings)
        x = x + positions(jnp.arange(length))
        x = x + table("token_type_embeddings", c.type_vocab_size)(types)
        normed = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)
        assert isinstance(normed, jax.Array)
        return normed


class SelfAttention(nn.Module):
    """Attention of each token to those that the mask lets through."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] and a mask [B, T] to [B, T, width]."""
        c = self.config
        shape = (*x.shape[:2], c.num_attention_heads, -1)
        query, key, value = (
            _dense(c.hidden_size, name=name)(x).reshape(shape)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        return y.reshape(x.shape)


class Output(nn.Module):
    """A dense layer and a layer norm after the shortcut."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array) -> jax.Array:
        """Maps [B, T, any] and the shortcut [B, T, width] to [B, T, width]."""
        x = _dense(self.config.hidden_size, name="dense")(x) + shortcut
        normed = nn.LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x)
        assert isinstance(normed, jax.Array)
        return normed


class Attention(nn.Module):
    """Self-attention and its output."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] and a mask [B, T] to [B, T, width]."""
        y = SelfAttention(self.config, name="self")(x, mask)
        return Output(self.config, name="output")(y, x)


class Intermediate(nn.Module):
    """A dense layer and an exact GELU."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, wider]."""
        x = _dense(self.config.intermediate_size, name="dense")(x)
        return nn.gelu(x, approximate=False)


class Block(nn.Module):
    """Attention and a perceptron, a layer norm after each."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] and a mask [B, T] to [B, T, width]."""
        x = Attention(self.config, name="attention")(x, mask)
        y = Intermediate(self.config, name="intermediate")(x)
        return Output(self.config, name="output")(y, x)


class Encoder(nn.Module):
    """Blocks one after another."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] and a mask [B, T] to [B, T, width]."""
        for number in range(self.config.num_hidden_layers):
            x = Block(self.config, name=f"layer_{number}")(x, mask)
        return x


class Bert(nn.Module):
    """An encoder of text, without a head.

    Attributes:
        config: Its sizes.
    """

    config: BertConfig = BertConfig()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens to hidden states.

        Args:
            tokens: [B, T].
            mask: [B, T], True or 1 where a token is no padding; default everywhere.
            types: [B, T], the segment of each token; default 0.

        Returns:
            [B, T, width].
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        types = jnp.zeros(tokens.shape, int) if types is None else types
        x = Embeddings(self.config, name="embeddings")(tokens, types)
        return Encoder(self.config, name="encoder")(x, mask)


def mean_pooled(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeddings of sentences, as of Sentence Transformers.

    ``y / ‖y‖`` with y the mean of the hidden states of all tokens that are no padding.

    Args:
        hidden: [B, T, width].
        mask: [B, T], True or 1 where a token is no padding, somewhere in each row.

    Returns:
        [B, width], of length 1.
    """
    share = (mask / jnp.sum(mask, axis=-1, keepdims=True)).astype(hidden.dtype)
    mean = jnp.einsum("btw,bt->bw", hidden, share)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
