"""Batches of a data set, each a pure function of a seed and its place.

Streams of random numbers grow from one seed and never meet: the order of the training
examples, their augmentation, and the choice of the examples that the Fisher matrix and
the batch-norm statistics are estimated from. Nothing is remembered from batch to batch,
so a run that resumes at any step goes on exactly as if it had not stopped.
"""

import functools
from collections.abc import Iterator

import numpy as np

from woodfisher_jax.data.dataset import DataSet

Batch = dict[str, np.ndarray]
"""'image' float32 [b, h, w, c] (normalised) and 'label' int32 [b]."""

_ORDER, _AUGMENT, _FISHER, _FISHER_AUGMENT, _NORM, _NORM_AUGMENT = range(6)


def normalize(dataset: DataSet, images: np.ndarray) -> np.ndarray:
    """Turns pixels into what a model sees: (pixels / scale - mean) / std.

    Args:
        dataset: whose constants to use.
        images: uint8 [..., c].

    Returns:
        float32 of the same shape.
    """
    result = images.astype(np.float32)
    result /= np.float32(dataset.scale)
    result -= np.asarray(dataset.mean, np.float32)
    result /= np.asarray(dataset.std, np.float32)
    return result


def steps_per_epoch(dataset: DataSet, batch_size: int) -> int:
    """Returns the number of full training batches in an epoch.

    Args:
        dataset: the data set.
        batch_size: examples in a batch.

    Returns:
        The training examples divided by `batch_size`, rounded down: what is left over
        after the last full batch sits out this epoch.

    Raises:
        ValueError: `batch_size` is below one or above the number of examples.
    """
    total = len(dataset.train.labels)
    if not 1 <= batch_size <= total:
        raise ValueError(
            f"batch_size: expected 1 to {total}, the training examples of "
            f"{dataset.name}; got {batch_size}"
        )
    return total // batch_size


def train_batch(
    dataset: DataSet,
    *,
    seed: int,
    epoch: int,
    step: int,
    batch_size: int,
    augment: bool = True,
) -> Batch:
    """Makes one training batch, the same whenever and wherever it is asked for.

    Args:
        dataset: the data set.
        seed: zero or above.
        epoch: zero or above; each epoch goes through the examples in its own order.
        step: the batch within the epoch, below `steps_per_epoch`.
        batch_size: examples in a batch.
        augment: whether to augment, where the data set says how. The examples are the
            same either way. Default True.

    Returns:
        The batch of `batch_size` examples.

    Raises:
        ValueError: an argument is out of range.
    """
    steps = steps_per_epoch(dataset, batch_size)
    if not 0 <= step < steps:
        raise ValueError(
            f"step: expected 0 to {steps - 1}, the full batches of {batch_size} in an "
            f"epoch of {dataset.name}; got {step}"
        )
    order = _epoch_order(len(dataset.train.labels), seed, epoch)
    chosen = order[step * batch_size : (step + 1) * batch_size]
    rng = _stream(seed, _AUGMENT, epoch, step) if augment else None
    return _gather(dataset, chosen, rng)


def test_batches(dataset: DataSet, batch_size: int) -> Iterator[Batch]:
    """Goes through the test images once, in their own order, in batches of one shape.

    To evaluate on the training images, pass `dataset._replace(test=dataset.train)`.

    Args:
        dataset: the data set.
        batch_size: examples in a batch; may exceed the number of test images.

    Returns:
        An iterator over batches, each with a third entry 'weight', float32
        [batch_size]: 1 for an image, 0 for the zeros that fill up the last batch.

    Raises:
        ValueError: `batch_size` is below one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more; got {batch_size}")
    starts = range(0, len(dataset.test.labels), batch_size)
    return (_padded_test_batch(dataset, start, batch_size) for start in starts)


def fisher_samples(
    dataset: DataSet, *, seed: int, draw: int, count: int, augment: bool = False
) -> Batch:
    """Draws the training examples for one estimate of the Fisher matrix.

    They depend on nothing that training did, so a resumed run prunes the same weights.
    A smaller `count` gives the first of the same examples.

    Args:
        dataset: the data set.
        seed: zero or above.
        draw: which estimate it is, zero or above, such as the index of the pruning
            step; each draws anew from all training examples.
        count: number of examples, drawn without replacement.
        augment: whether to augment, where the data set says how. Default False.

    Returns:
        The batch of `count` examples, in the order they were drawn.

    Raises:
        ValueError: `count` is below one or above the number of training examples, or
            `seed` or `draw` is negative.
    """
    total = len(dataset.train.labels)
    if count > total:
        raise ValueError(
            f"num_samples x batch_size = {count} examples were asked for but the "
            f"training set of {dataset.name} has {total}; lower one of the two"
        )
    chosen = _choose(dataset, count, _stream(seed, _FISHER, draw))
    rng = _stream(seed, _FISHER_AUGMENT, draw) if augment else None
    return _gather(dataset, chosen, rng)


def batch_norm_batches(
    dataset: DataSet,
    *,
    seed: int,
    draw: int,
    count: int,
    batch_size: int,
    augment: bool = True,
) -> Iterator[Batch]:
    """Draws the training examples for one estimate of batch-norm statistics.

    Args:
        dataset: the data set.
        seed: zero or above.
        draw: which estimate it is, zero or above; each draws anew.
        count: number of examples, drawn without replacement.
        batch_size: examples in a batch; the last may be smaller.
        augment: whether to augment, where the data set says how. Default True.

    Returns:
        An iterator over batches.

    Raises:
        ValueError: an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more; got {batch_size}")
    chosen = _choose(dataset, count, _stream(seed, _NORM, draw))
    rng = _stream(seed, _NORM_AUGMENT, draw) if augment else None
    return (
        _gather(dataset, chosen[start : start + batch_size], rng)
        for start in range(0, count, batch_size)
    )


def _choose(dataset: DataSet, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of training examples, drawn without replacement [count]."""
    total = len(dataset.train.labels)
    if not 1 <= count <= total:
        raise ValueError(
            f"count: expected 1 or more, and at most the {total} training examples of "
            f"{dataset.name}; got {count}"
        )
    return rng.permutation(total)[:count]


def _stream(seed: int, *place: int) -> np.random.Generator:
    """The generator of one place; no two places share one, nor do two seeds."""
    if min(seed, *place) < 0:
        raise ValueError(
            "seed, epoch, draw: expected zero or above; got "
            f"seed {seed} and epoch or draw {place[1]}"
        )
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


@functools.lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the training examples in an epoch: a permutation [total]."""
    order = _stream(seed, _ORDER, epoch).permutation(total)
    order.flags.writeable = False  # every caller gets the same array
    return order


def _gather(
    dataset: DataSet, chosen: np.ndarray, rng: np.random.Generator | None
) -> Batch:
    """Training examples by index, augmented if there is a generator and a way."""
    images = dataset.train.images[chosen]
    if rng is not None and dataset.augment is not None:
        images = dataset.augment(rng, images)
    return {
        "image": normalize(dataset, images),
        "label": dataset.train.labels[chosen],
    }


def _padded_test_batch(dataset: DataSet, start: int, batch_size: int) -> Batch:
    """Test examples from `start` on, filled up with zeros of weight 0."""
    images = dataset.test.images[start : start + batch_size]
    labels = dataset.test.labels[start : start + batch_size]
    fill = batch_size - len(labels)
    return {
        "image": np.pad(
            normalize(dataset, images), ((0, fill), (0, 0), (0, 0), (0, 0))
        ),
        "label": np.pad(labels, (0, fill)),
        "weight": np.pad(np.ones(len(labels), np.float32), (0, fill)),
    }
