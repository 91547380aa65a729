"""The highest of many scores, found without a sort."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE = 2**16
"""Scores that a threshold is estimated from, where it need not be exact."""


def nth_highest(values: jax.Array, number: jax.Array) -> jax.Array:
    """The highest value that at least ``number`` of some values reach, bit by bit.

    One pass for each bit of a value, which on a CPU takes a tenth of a sort.

    Args:
        values: Floating point, any shape, without NaN.
        number: A scalar; NaN is returned for 0.
    """
    width = jnp.finfo(values.dtype).bits
    whole = jnp.dtype(f"uint{width}")
    sign = jnp.array(1, whole) << (width - 1)
    bits = jax.lax.bitcast_convert_type(values, whole)
    # Unsigned numbers in the order of the values.
    keys = jnp.where(bits < sign, bits | sign, ~bits)

    def tighter(place: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (sign >> place.astype(whole))
        return jnp.where(jnp.sum(keys >= candidate) >= number, candidate, threshold)

    key = jax.lax.fori_loop(0, width, tighter, jnp.array(0, whole))
    found = jnp.where(key < sign, ~key, key ^ sign)
    return jax.lax.bitcast_convert_type(found, values.dtype)


@partial(jax.jit, static_argnames="bounds")
def keep_highest(
    scores: jax.Array,
    mask: jax.Array,
    kept: jax.Array,
    bounds: tuple[int, ...] | None = None,
) -> jax.Array:
    """Keeps the weights with the ``kept`` highest scores among those in the mask.

    Exactly ``min(kept, sum(mask))`` weights are kept. Of equal scores each tensor keeps
    its share, and in a tensor those of lower index stay. The result is nested in
    ``mask``.

    Args:
        scores: Finite scores, higher = more important [n].
        mask: Weights that may be kept [n], bool.
        kept: How many to keep, in [0, n].
        bounds: Where tensors start, and last n; default one tensor. Static.

    Returns:
        The new mask [n], bool.

    Example:
        >>> scores = jnp.array([3.0, 1.0, 2.0, 2.0])
        >>> wf.masks.keep_highest(scores, jnp.ones(4, bool), 2).tolist()
        [True, False, True, False]
    """
    ranked = jnp.where(mask, scores, -jnp.inf)
    kth = nth_highest(ranked, kept)
    above = ranked > kth
    tied = ranked == kth
    room = kept - jnp.sum(above)
    if bounds is None or len(bounds) <= 2:
        stays = first_of(tied, room)
    else:
        running = running_count(tied)
        ends = running[np.asarray(bounds[1:]) - 1]
        most = jnp.diff(ends, prepend=0)
        limits = ends - most + _shared_out(room, most)
        parts = zip(pairwise(bounds), limits, strict=True)
        stays = jnp.concatenate([running[i:j] <= limit for (i, j), limit in parts])
    return (above | (tied & stays)) & mask & (kept > 0)


def first_of(marks: jax.Array, number: jax.Array) -> jax.Array:
    """The longest range from the start with at most so many marks in it.

    One pass for each bit of its length. A running count, of which it could be read,
    takes a compiler for TPUs five times as long.

    Args:
        marks: Bool [n].
        number: A scalar.

    Returns:
        Bool [n].
    """
    places = jnp.arange(marks.size)
    bits = marks.size.bit_length()

    def longer(i: jax.Array, length: jax.Array) -> jax.Array:
        candidate = length | (1 << (bits - 1 - i))
        inside = jnp.sum(marks & (places < candidate))
        return jnp.where(inside <= number, candidate, length)

    return places < jax.lax.fori_loop(0, bits, longer, jnp.zeros((), places.dtype))


def running_count(marks: jax.Array) -> jax.Array:
    """How many marks there are up to each place, itself included.

    In rows of about the square root of the length: a running sum of 25 million entries
    takes a compiler for TPUs 16 s, two of 5,000 take 3.6 s.

    Args:
        marks: Bool [n].

    Returns:
        Array [n] of the type that JAX counts in, int32 or int64.
    """
    width = 1 << (marks.size.bit_length() // 2)
    rows = jnp.pad(marks, (0, -marks.size % width)).reshape(-1, width)
    counts = jnp.sum(rows, axis=1)
    before = jnp.cumsum(counts) - counts
    running = jnp.cumsum(rows, axis=1) + before[:, None]
    return running.reshape(-1)[: marks.size]


def _shared_out(number: jax.Array, most: jax.Array) -> jax.Array:
    """A number shared out in proportion to ``most`` [k], no part above its own."""

    def one(
        left: tuple[jax.Array, jax.Array], size: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        number, total = left
        part = jnp.round(number * (size / jnp.maximum(total, 1))).astype(size.dtype)
        # Float32 rounds above 2²⁴; the rest must be able to take what is left.
        part = jnp.clip(part, number - (total - size), jnp.minimum(size, number))
        return (number - part, total - size), part

    start = jnp.asarray(number, most.dtype), jnp.sum(most)
    return jax.lax.scan(one, start, most)[1]


def keep_about(scores: jax.Array, mask: jax.Array, kept: jax.Array) -> jax.Array:
    """Keeps about as many weights as :func:`keep_highest`, by a sample of the scores.

    Args:
        scores: As there, of any shape.
        mask: The same.
        kept: The same.
    """
    ranked = jnp.where(mask, scores, -jnp.inf)
    # An odd stride, so that the sample goes through all rows and columns.
    stride = max(1, scores.size // SAMPLE) | 1
    sample = ranked.reshape(-1)[::stride]
    return (ranked >= nth_highest(sample, kept / scores.size * sample.size)) & mask
