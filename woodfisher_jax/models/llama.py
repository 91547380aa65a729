"""Decoders of Llama's form (Touvron et al. 2023, arXiv:2302.13971).

Names are Hugging Face's: ``params/model/layers_0/self_attn/q_proj/kernel`` is
``model.layers.0.self_attn.q_proj.weight``.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.models.layers import Resizable, num_heads, width
from woodfisher_jax.options import Options, option

_normal = nn.initializers.normal(0.02)

_dense = partial(nn.Dense, use_bias=False, kernel_init=_normal)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Options):
    """Sizes of a decoder; names and defaults are Hugging Face's."""

    vocab_size: int = option(32000, "Tokens there are.", least=1)
    hidden_size: int = option(4096, "Width of the residual stream.", least=1)
    num_hidden_layers: int = option(32, "Blocks.", least=1)
    intermediate_size: int = option(11008, "Width inside the perceptron.", least=1)
    num_attention_heads: int = option(32, "Heads of the queries.", least=1)
    num_key_value_heads: int | None = option(
        None,
        "Heads of keys and values, a divisor of the heads of the queries; default as "
        "many.",
        least=1,
    )
    head_dim: int | None = option(
        None, "Width of a head; default hidden_size / num_attention_heads.", least=2
    )
    max_position_embeddings: int = option(
        2048, "Tokens a text that it was trained with; it takes more.", least=1
    )
    rope_theta: float = option(1e4, "Base of the rotary positions.", above=0)
    rms_norm_eps: float = option(1e-6, "Added to the mean square.", above=0)
    tie_word_embeddings: bool = option(
        False, "Whether the head is the table of the embeddings."
    )

    def __post_init__(self) -> None:
        """Checks the heads.

        Raises:
            ValueError: If they do not divide what they are to divide.
        """
        super().__post_init__()
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}; expected a divisor "
                f"of num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}; expected a divisor "
                f"of hidden_size={self.hidden_size}, or a head_dim"
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_dim={self.head_width}; expected an even number, for rotary "
                "positions turn pairs"
            )

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) for heads of width d.

    ``(x_i, x_(i+d/2))`` is turned by the angle ``t theta^(-2i/d)`` at position t.

    Args:
        x: [B, T, heads, d].
        theta: Base of the angles.

    Returns:
        [B, T, heads, d].
    """
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), theta ** (-np.arange(half) / half))
    cos, sin = (jnp.asarray(f(angles), x.dtype)[:, None] for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1)


class Attention(nn.Module):
    """Causal self-attention in which groups of queries share keys and values."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        c = self.config

        queries = num_heads(self, "q_proj", c.num_attention_heads, c.head_width)
        keys = num_heads(self, "k_proj", c.key_value_heads, c.head_width)
        if queries % keys:
            raise ValueError(
                f"widths: {'/'.join(self.path)} has {queries} heads of queries for "
                f"{keys} of keys; expected as many in each group"
            )

        def heads(name: str, number: int) -> jax.Array:
            y = _dense(number * c.head_width, name=name)(x)
            return y.reshape(*x.shape[:2], number, c.head_width)

        query = rotated(heads("q_proj", queries), c.rope_theta)
        key = rotated(heads("k_proj", keys), c.rope_theta)
        value = heads("v_proj", keys)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return _dense(x.shape[-1], name="o_proj")(y.reshape(*x.shape[:2], -1))


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): ``W_d (silu(W_g x) * W_u x)``."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        inside = width(self, "gate_proj", self.config.intermediate_size)
        gate = nn.silu(_dense(inside, name="gate_proj")(x))
        up = _dense(inside, name="up_proj")(x)
        return _dense(x.shape[-1], name="down_proj")(gate * up)


class Block(nn.Module):
    """Attention and a perceptron, each after an RMS norm and beside a shortcut."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, width] to [B, T, width]."""
        norm = partial(nn.RMSNorm, self.config.rms_norm_eps)
        y = norm(name="input_layernorm")(x)
        x = x + Attention(self.config, name="self_attn")(y)
        y = norm(name="post_attention_layernorm")(x)
        return x + Mlp(self.config, name="mlp")(y)


class Decoder(nn.Module):
    """Embeddings and blocks."""

    config: LlamaConfig

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        length = width(self, "embed_tokens", c.hidden_size)
        self.embed_tokens = nn.Embed(c.vocab_size, length, embedding_init=_normal)
        # Linen calls them layers_0, layers_1 and so on.
        self.layers = [Block(c) for _ in range(c.num_hidden_layers)]
        self.norm = nn.RMSNorm(c.rms_norm_eps)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, T] to hidden states [B, T, width] after the last norm."""
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x)
        return self.norm(x)


class Llama(Resizable):
    """A language model: RMS norms, rotary positions, grouped queries, SwiGLU.

    Attributes:
        config: Its sizes.
    """

    config: LlamaConfig = LlamaConfig()

    def setup(self) -> None:
        """Makes the submodules."""
        self.model = Decoder(self.config)
        if not self.config.tie_word_embeddings:
            self.lm_head = _dense(self.config.vocab_size)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, T] to the logits of the token after each, [B, T, vocab]."""
        x = self.model(tokens)
        if self.config.tie_word_embeddings:
            logits = self.model.embed_tokens.attend(x)
        else:
            logits = self.lm_head(x)
        assert isinstance(logits, jax.Array)
        return logits

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, T] to what the head takes, [B, T, width].

        Called as ``model.apply(variables, tokens, method="hidden")``.
        """
        hidden = self.model(tokens)
        assert isinstance(hidden, jax.Array)
        return hidden
