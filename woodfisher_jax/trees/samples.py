"""Samples as users provide them, regrouped into batches of the required size."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

Batch = Any
"""A pytree of arrays with a common leading axis of examples."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples that are read again for each use and need not fit in memory.

    Attributes:
        size: Number of examples.
        read: Returns an iterator over their batches, the same at each call.
    """

    size: int
    read: Callable[[], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        """Iterates over the batches from the first."""
        return self.read()


def _plain(samples: Any) -> Any:
    """The same with a dict for every mapping that JAX does not know as a pytree."""
    return jax.tree.map(
        lambda leaf: _plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf, samples
    )


def is_batch(samples: Any) -> bool:
    """Whether samples are one batch: arrays in tuples or dicts, but not in a list."""
    if isinstance(samples, (list, Iterator, Examples)):
        return False
    leaves = jax.tree.leaves(_plain(samples))
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def on_host(leaf: Any) -> Any:
    """An array as one of NumPy; JAX's typed random keys, which have none, as they are.

    Raises:
        TypeError: If its entries are no numbers.
        ValueError: If other processes have parts of it.
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            "samples: an array is spread over several processes; expected all samples "
            "in every process, such as NumPy arrays"
        )
    array = np.asarray(leaf)
    if array.dtype.kind in "OSUMm":
        raise TypeError(
            f"samples: an array has dtype {array.dtype}, which JAX does not have; "
            "expected numbers. Encode it before, or leave it out of the batch"
        )
    return array


def batch_length(batch: Batch) -> int:
    """Number of examples in a batch.

    Raises:
        ValueError: If its arrays differ in it, or have no leading axis.
    """
    leaves = jax.tree.leaves(batch)
    shapes = [np.shape(leaf) for leaf in leaves]
    if not shapes or any(not shape for shape in shapes):
        kinds = sorted({type(leaf).__name__ for leaf in leaves if not np.shape(leaf)})
        remedy = ""
        if isinstance(batch, list):
            remedy = ". Make lists of one length an array, as by np.array(samples)"
        raise ValueError(
            "samples: a batch must be a pytree of arrays with a leading axis of "
            f"examples; got shapes {shapes}, with entries of type {kinds}{remedy}"
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "samples: the arrays of a batch must agree on the number of examples "
            f"(their first axis); got shapes {shapes}"
        )
    return shapes[0][0]


def num_examples(samples: Any) -> int | None:
    """Number of examples, or None if it is not known before all are read.

    Args:
        samples: One batch (array, tuple or dict of arrays), a list of batches,
            :class:`Examples`, or any iterable of batches.

    Raises:
        ValueError: If a batch has no leading axis, or a list of two arrays may be two
            batches or one.
    """
    if isinstance(samples, Examples):
        return samples.size
    if is_batch(samples):
        return batch_length(_plain(samples))
    if isinstance(samples, list):
        _check_unambiguous(samples)
        parts = [_plain(batch) for batch in samples]
        total = sum(batch_length(batch) for batch in parts)
        _check_alike(parts)
        return total
    return None


def _check_unambiguous(parts: list[Batch]) -> None:
    """Raises for a list such as [inputs, labels], which is no list of batches."""
    are_arrays = len(parts) == 2 and all(hasattr(part, "shape") for part in parts)
    if are_arrays and np.shape(parts[0]) == np.shape(parts[1]):
        raise ValueError(
            f"samples is a list of two arrays of shape {np.shape(parts[0])}, which may "
            "be one batch of two arrays or two batches; give (first, second), a tuple, "
            "for one batch, np.concatenate([first, second]) for two"
        )


def _batches(samples: Any) -> Iterator[Batch]:
    if is_batch(samples):
        yield _plain(samples)
    elif isinstance(samples, Iterable) and not isinstance(samples, (str, Mapping)):
        if isinstance(samples, list):
            _check_unambiguous(samples)
        # Not `yield from`, which would also close the user's generator.
        for batch in samples:
            yield _plain(batch)
    else:
        of = ""
        if isinstance(samples, Mapping):
            kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(_plain(samples))}
            of = f" of {', '.join(sorted(kinds))}"
        raise TypeError(
            "samples must be one batch (array, tuple or dict of arrays) or an iterable "
            f"of batches; got {type(samples).__name__}{of}"
        )


def _check_alike(parts: list[Batch]) -> None:
    """Raises unless batches have one structure, and examples one shape and kind."""

    def kind(leaf: Any) -> tuple[Any, ...]:
        found = on_host(leaf).dtype
        # Inputs and labels of one batch, in a list, have two kinds.
        name = "float" if jnp.issubdtype(found, jnp.inexact) else "int"
        if not isinstance(found, np.dtype):
            name = str(found)  # typed random keys
        return (name, "any", *np.shape(leaf)[1:])

    kinds = {str(jax.tree.map(kind, part)): None for part in parts}
    if len(kinds) > 1:
        first, second, *_ = kinds
        raise ValueError(
            "samples: all batches must have the same structure and, beyond their first "
            "axis, the same shapes, of whole numbers or of floats; got "
            f"{first} and {second}. One batch of several arrays is a tuple or dict, "
            "not a list"
        )


def _join(parts: list[Batch]) -> Batch:
    _check_alike(parts)
    if len(parts) == 1:
        return jax.tree.map(on_host, parts[0])
    return jax.tree.map(_concatenated, *parts)


def _concatenated(*leaves: Any) -> Any:
    found = [on_host(leaf) for leaf in leaves]
    if all(isinstance(leaf, np.ndarray) for leaf in found):
        return np.concatenate(found)
    return jnp.concatenate(found)


def regroup(samples: Any, size: int) -> Iterator[Batch]:
    """Regroups a stream of batches into batches of ``size`` examples.

    Args:
        samples: One batch, or an iterable of batches of any sizes.
        size: Examples in a batch.

    Yields:
        NumPy batches in the order of the stream; the last may be shorter. Typed random
        keys stay arrays of JAX; a mapping that JAX does not know comes as a dict.
    """
    held: list[Batch] = []
    length = 0
    for batch in _batches(samples):
        held.append(batch)
        length += batch_length(batch)
        if length < size:
            continue
        whole = _join(held)
        for start in range(0, length - size + 1, size):
            yield jax.tree.map(lambda a, s=start: a[s : s + size], whole)
        length %= size
        held = [jax.tree.map(lambda a, n=length: a[len(a) - n :], whole)]
        held = held if length else []
    if held:
        yield _join(held)


def shapes_of(example: Batch, size: int) -> Batch:
    """A batch of ``size`` examples as a pytree of ``jax.ShapeDtypeStruct``.

    Args:
        example: A batch of any length.
        size: Number of examples.
    """
    return jax.tree.map(lambda a: shape_of(a, (size, *np.shape(a)[1:])), example)


def shape_of(
    leaf: Any, shape: tuple[int, ...], sharding: NamedSharding | None = None
) -> jax.ShapeDtypeStruct:
    """An array of a batch with another shape, in the dtype that a device has for it.

    Args:
        leaf: An array, or typed random keys.
        shape: In its place.
        sharding: Over devices; default none.
    """
    dtype = on_host(leaf).dtype
    if isinstance(dtype, np.dtype):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
