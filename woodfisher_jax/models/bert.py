"""Encoders of BERT's form (Devlin et al. 2018, arXiv:1810.04805).

Names are Hugging Face's: ``params/encoder/layer_0/attention/self/query/kernel`` is
``encoder.layer.0.attention.self.query.weight``.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from woodfisher_jax.models.layers import Resizable, num_heads, width
from woodfisher_jax.options import Options, option

_normal = nn.initializers.normal(0.02)

_dense = partial(nn.Dense, kernel_init=_normal)


@dataclasses.dataclass(frozen=True)
class BertConfig(Options):
    """Sizes of an encoder; names and defaults are Hugging Face's."""

    vocab_size: int = option(30522, "Tokens there are.", least=1)
    hidden_size: int = option(768, "Width of the residual stream.", least=1)
    num_hidden_layers: int = option(12, "Blocks.", least=1)
    num_attention_heads: int = option(12, "Heads, a divisor of hidden_size.", least=1)
    intermediate_size: int = option(3072, "Width inside the perceptron.", least=1)
    max_position_embeddings: int = option(512, "Most tokens of a text.", least=1)
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
    """Sum of a token's, its position's and its segment's vectors, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """Maps tokens and their segments [B, T] to [B, T, width]."""
        c = self.config

        length = width(self, "word_embeddings", c.hidden_size)

        def table(number: int, name: str) -> nn.Embed:
            return nn.Embed(number, length, embedding_init=_normal, name=name)

        positions = jnp.arange(tokens.shape[1])
        x = table(c.vocab_size, "word_embeddings")(tokens)
        x += table(c.type_vocab_size, "token_type_embeddings")(segments)
        x += table(c.max_position_embeddings, "position_embeddings")(positions)
        return nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)


class SelfAttention(nn.Module):
    """Every token of a text looks at all of them."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps tokens [B, T, width], real where mask [B, T], to [B, T, heads * d]."""
        c = self.config
        size = c.hidden_size // c.num_attention_heads
        number = num_heads(self, "query", c.num_attention_heads, size)

        def heads(name: str) -> jax.Array:
            y = _dense(number * size, name=name)(x)
            return y.reshape(*x.shape[:2], number, size)

        query, key, value = map(heads, ("query", "key", "value"))
        seen = None if mask is None else mask.astype(bool)[:, None, None]
        y = jax.nn.dot_product_attention(query, key, value, mask=seen)
        return y.reshape(*x.shape[:2], -1)


class Output(nn.Module):
    """A dense layer, then the layer norm of its sum with the shortcut."""

    config: BertConfig

    @nn.compact
    def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """Maps features [B, T, n] and shortcut [B, T, width] to [B, T, width]."""
        y = _dense(x.shape[-1], name="dense")(y)
        return nn.LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x + y)


class Attention(nn.Module):
    """Self-attention and its output."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps tokens [B, T, width], real where mask [B, T], to [B, T, width]."""
        y = SelfAttention(self.config, name="self")(x, mask)
        return Output(self.config, name="output")(y, x)


class Intermediate(nn.Module):
    """A dense layer and an exact GELU."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, intermediate_size]."""
        inside = width(self, "dense", self.config.intermediate_size)
        return nn.gelu(_dense(inside, name="dense")(x), approximate=False)


class Block(nn.Module):
    """Attention and a perceptron, each normalised after its shortcut."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps tokens [B, T, width], real where mask [B, T], to [B, T, width]."""
        x = Attention(self.config, name="attention")(x, mask)
        y = Intermediate(self.config, name="intermediate")(x)
        return Output(self.config, name="output")(y, x)


class Encoder(nn.Module):
    """The blocks."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps tokens [B, T, width], real where mask [B, T], to [B, T, width]."""
        for number in range(self.config.num_hidden_layers):
            x = Block(self.config, name=f"layer_{number}")(x, mask)
        return x


class Bert(Resizable):
    """An encoder of texts: learned positions, layer norms after shortcuts, GELU.

    Attributes:
        config: Its sizes.
    """

    config: BertConfig = BertConfig()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens to hidden states, one for each.

        Args:
            tokens: [B, T], T at most ``max_position_embeddings``.
            mask: [B, T], true at tokens and false at padding; default all true.
            segments: [B, T], kind of the segment of a token; default 0.

        Returns:
            [B, T, width]; what it holds at padding means nothing.

        Raises:
            ValueError: If the texts are longer than there are positions.
        """
        most = self.config.max_position_embeddings
        if tokens.shape[1] > most:
            raise ValueError(
                f"tokens: expected at most max_position_embeddings={most} a text, got "
                f"{tokens.shape[1]}; cut the texts"
            )
        if segments is None:
            segments = jnp.zeros_like(tokens)
        x = Embeddings(self.config, name="embeddings")(tokens, segments)
        return Encoder(self.config, name="encoder")(x, mask)


def mean_pooled(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """One vector a text, as sentence-transformers take it: the mean over its tokens.

    ``sum_t m_t h_t / sum_t m_t``.

    Args:
        hidden: [B, T, width].
        mask: [B, T], true at tokens, of which a text has at least one, and false at
            padding; default all true.

    Returns:
        [B, width], not normalised.
    """
    where = None if mask is None else mask.astype(bool)[..., None]
    return jnp.mean(hidden, axis=1, where=where)
