"""Samples as users provide them, regrouped into batches of the required size."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

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


def _is_batch(samples: Any) -> bool:
    """Whether samples are one batch: arrays in tuples or dicts, but not in a list."""
    if isinstance(samples, (list, Iterator)):
        return False
    leaves = jax.tree.leaves(samples)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def batch_length(batch: Batch) -> int:
    """Number of examples in a batch.

    Raises:
        ValueError: If its arrays differ in it, or have no leading axis.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(not shape for shape in shapes):
        raise ValueError(
            "samples: a batch must be a pytree of arrays with a leading axis of "
            f"examples; got shapes {shapes}"
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
    """
    if isinstance(samples, Examples):
        return samples.size
    if _is_batch(samples):
        return batch_length(samples)
    if isinstance(samples, list):
        _check_alike(samples)
        return sum(batch_length(batch) for batch in samples)
    return None


def _batches(samples: Any) -> Iterator[Batch]:
    if _is_batch(samples):
        yield samples
    elif isinstance(samples, Iterable) and not isinstance(samples, (str, dict)):
        # Not `yield from`, which would also close the user's generator.
        for batch in samples:  # noqa: UP028
            yield batch
    else:
        raise TypeError(
            "samples must be one batch (array, tuple or dict of arrays) or an iterable "
            f"of batches; got {type(samples).__name__}"
        )


def _check_alike(parts: list[Batch]) -> None:
    """Raises unless all batches have the same structure and, per example, shapes."""
    kinds = {
        str(jax.tree.map(lambda leaf: ("any", *np.shape(leaf)[1:]), part)): None
        for part in parts
    }
    if len(kinds) > 1:
        first, second, *_ = kinds
        raise ValueError(
            "samples: all batches must have the same structure and, beyond their first "
            f"axis, the same shapes; got {first} and {second}. One batch of several "
            "arrays is a tuple or dict, not a list"
        )


def _join(parts: list[Batch]) -> Batch:
    _check_alike(parts)
    if len(parts) == 1:
        return jax.tree.map(np.asarray, parts[0])
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def regroup(samples: Any, size: int) -> Iterator[Batch]:
    """Regroups a stream of batches into batches of ``size`` examples.

    Args:
        samples: One batch, or an iterable of batches of any sizes.
        size: Examples in a batch.

    Yields:
        NumPy batches in the order of the stream; the last may be shorter.
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
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (size, *np.shape(a)[1:]), jax.dtypes.canonicalize_dtype(np.asarray(a).dtype)
        ),
        example,
    )
