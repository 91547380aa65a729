"""How well a language model predicts text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.progress import Callback, silent


class Perplexity(NamedTuple):
    """Exponential of the mean negative log-likelihood of a token.

    Attributes:
        all: Over all sequences.
        by_kind: Over those of each kind; empty where kinds are not known.
    """

    all: float
    by_kind: dict[str, float]


# Of the function, not of a call: pruned weights take the program of the dense ones.
@partial(jax.jit, static_argnums=0)
def sequence_loss(
    net_fn: Callable[[Any, jax.Array], jax.Array], params: Any, sequence: jax.Array
) -> jax.Array:
    """Mean negative log-likelihood of the tokens of a sequence after the first."""
    logits = net_fn(params, sequence[None])[0, :-1].astype(jnp.float32)
    own = jnp.take_along_axis(logits, sequence[1:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own)


def perplexity(
    net_fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    tokens: Any,
    kinds: Sequence[str] = (),
    progress: Callback = silent,
) -> Perplexity:
    """Measures a language model on text, a sequence at a time.

    ``exp(-mean_t log softmax(z_t)[x_(t+1)])`` with the logits z of each token but the
    last.

    Args:
        net_fn: (params, tokens [1, T]) -> logits [1, T, vocabulary].
        params: Any pytree.
        tokens: [sequences, T], whole numbers below vocabulary; T is 2 or more.
        kinds: Of each sequence; default not known.
        progress: Called with (label, done, total).

    Raises:
        OptionError: If tokens are of another shape, or outside the vocabulary.

    Example:
        >>> from woodfisher_jax.training.language.perplexity import perplexity
        >>> def uniform(params, tokens):
        ...     return jnp.zeros((*tokens.shape, 5))
        >>> round(perplexity(uniform, {}, [[0, 1, 2]]).all, 4)
        5.0
    """
    tokens = np.asarray(tokens)
    _check_tokens(net_fn, params, tokens)
    tokens = tokens.astype(np.int32)
    losses = []
    for number, sequence in enumerate(tokens):
        progress("perplexity", number, len(tokens))
        losses.append(float(sequence_loss(net_fn, params, sequence)))
    progress("perplexity", len(tokens), len(tokens))
    found: dict[str, list[float]] = {}
    for kind, value in zip(kinds, losses, strict=bool(kinds)):
        found.setdefault(kind, []).append(value)
    by_kind = {kind: float(np.exp(np.mean(values))) for kind, values in found.items()}
    return Perplexity(float(np.exp(np.mean(losses))), by_kind)


def _check_tokens(net_fn: Any, params: Any, tokens: np.ndarray) -> None:
    """Raises for tokens without a logit, in whose place JAX takes another's or NaN."""
    whole = np.issubdtype(tokens.dtype, np.integer)
    if tokens.ndim != 2 or not whole or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise OptionError(
            "tokens",
            f"tokens is {tokens.dtype}{list(tokens.shape)}; expected whole numbers "
            "[sequences, T] with T 2 or more",
        )
    one = jax.ShapeDtypeStruct((1, tokens.shape[1]), np.int32)
    vocabulary = jax.eval_shape(net_fn, params, one).shape[-1]
    wrong = np.argwhere((tokens < 0) | (tokens >= vocabulary))
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        raise OptionError(
            "tokens",
            f"tokens has {tokens[place]} at {list(place)}; expected 0 to "
            f"{vocabulary - 1}, the numbers of net_fn's logits: take the tokenizer of "
            "this network",
        )
