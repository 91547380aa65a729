"""Batches of a data set, each a pure function of a seed and its place.

Independent streams of random numbers grow from one seed: the order of the training
examples, their augmentation, and the choice of the examples that the Fisher matrix and
the batch-norm statistics are estimated from. No state passes from batch to batch, so a
run that resumes at any step continues as if it had not stopped.

Images in memory are augmented batch by batch, images in files one by one: the random
numbers of the latter grow from seed, epoch and the image's index.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from woodfisher_jax.data.dataset import DataSet, Split
from woodfisher_jax.data.streams import NO_IMAGE, ImageStream, Randomness
from woodfisher_jax.trees.samples import Examples

Batch = dict[str, np.ndarray]
"""'image' float32 [b, h, w, c] (normalised) and 'label' int32 [b]."""

Shard = tuple[int, int]
"""Which part of each batch: (index, count), such as a process among all."""

FISHER_CHUNK = 64
"""Images in a batch of the Fisher samples of a data set in files."""

# First number of a stream's place. The values are part of every result: do not reorder.
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
    """Returns the number of full training batches in an epoch, without a remainder.

    Raises:
        ValueError: `batch_size` is below one or above the number of examples.
    """
    total = dataset.num_train
    if not 1 <= batch_size <= total:
        raise ValueError(
            f"batch_size: expected 1 to {total}, the training examples of "
            f"{dataset.name}; got {batch_size}"
        )
    return total // batch_size


def epoch_batches(
    dataset: DataSet,
    *,
    seed: int,
    epoch: int,
    start: int,
    stop: int,
    batch_size: int,
    augment: bool = True,
    shard: Shard = (0, 1),
) -> Iterator[Batch]:
    """Iterates over some steps of an epoch, or over one process's share of them.

    Batch by batch, the shares of all processes concatenated are the whole batch, bit
    for bit, augmentation included.

    Args:
        dataset: the data set.
        seed: zero or above.
        epoch: zero or above; each epoch has the examples in an order of its own.
        start: the first step within the epoch, zero or above.
        stop: the step after the last, at most `steps_per_epoch`.
        batch_size: examples in a batch of all processes together.
        augment: whether to augment, where the data set says how. The examples are the
            same either way. Default True.
        shard: (index, count): rows index · b / count to (index + 1) · b / count of
            each batch of b = `batch_size`. Default all rows.

    Returns:
        An iterator over stop - start batches of `batch_size` / count examples.

    Raises:
        ValueError: an argument is out of range, or `batch_size` is no multiple of
            count.
    """
    steps = steps_per_epoch(dataset, batch_size)
    if not 0 <= start <= stop <= steps:
        raise ValueError(
            f"start, stop: expected 0 <= start <= stop <= {steps}, the full batches of "
            f"{batch_size} in an epoch of {dataset.name}; got {start} and {stop}"
        )
    _check_shard(shard)
    index, count = shard
    if batch_size % count:
        raise ValueError(
            f"batch_size: expected a multiple of {count}, the number of shards; got "
            f"{batch_size}"
        )
    share = batch_size // count
    rows = slice(index * share, (index + 1) * share)
    order = _epoch_order(dataset.num_train, seed, epoch)
    order = order[start * batch_size : stop * batch_size].reshape(-1, batch_size)
    stream = functools.partial(_stream, seed, _AUGMENT, epoch) if augment else None
    split = dataset.train
    if isinstance(split, ImageStream):
        return _read(dataset, split, order[:, rows].reshape(-1), share, stream)
    return (
        _gather(dataset, split, chosen, stream(step) if stream else None, rows)
        for step, chosen in enumerate(order, start)
    )


def test_batches(
    dataset: DataSet,
    batch_size: int,
    shard: Shard = (0, 1),  # noqa: PT028 (no test)
) -> Iterator[Batch]:
    """Iterates over the test images once, in their own order, in batches of one shape.

    To evaluate on the training images, pass `dataset._replace(test=dataset.train)`.

    Args:
        dataset: the data set.
        batch_size: examples in a batch of all processes together; may exceed the
            number of test images. It is rounded up to a multiple of the number of
            shards.
        shard: (index, count): the part of each batch, as in `epoch_batches`. Default
            all of it.

    Returns:
        An iterator over batches, each with a third entry 'weight', float32
        [batch_size / count]: 1 for an image, 0 for the zeros that fill up the last
        batch. Every shard has as many batches, and each image is in one of them. An
        image file that cannot be read is zeros of weight 0 too, see `ImageStream`.

    Raises:
        ValueError: `batch_size` is below one, or there is no such shard.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more; got {batch_size}")
    _check_shard(shard)
    index, count = shard
    share = -(-batch_size // count)
    split = dataset.test
    starts = np.arange(index * share, split.size + index * share, share * count)
    order = starts[:, None] + np.arange(share)
    order[order >= split.size] = NO_IMAGE
    if isinstance(split, ImageStream):
        finish = functools.partial(normalize, dataset)
        return split.read(
            order.reshape(-1), share, None, substitute=False, finish=finish
        )
    return (_test_batch(dataset, split, chosen) for chosen in order)


def fisher_samples(
    dataset: DataSet, *, seed: int, draw: int, count: int, augment: bool = False
) -> Batch | Examples:
    """Draws the training examples for one estimate of the Fisher matrix.

    They do not depend on training, so a resumed run prunes the same weights. A smaller
    `count` gives the first of the same examples.

    Args:
        dataset: the data set.
        seed: zero or above.
        draw: which estimate it is, zero or above, such as the index of the pruning
            step; each draws from all training examples.
        count: number of examples, drawn without replacement.
        augment: whether to augment, where the data set says how. Default False.

    Returns:
        `count` examples, in the order they were drawn: one batch, or `Examples` of a
        data set in files, which are read when they are needed.

    Raises:
        ValueError: `count` is below one or above the number of training examples, or
            `seed` or `draw` is negative.
    """
    chosen = _choose(dataset, count, _stream(seed, _FISHER, draw))
    stream = functools.partial(_stream, seed, _FISHER_AUGMENT, draw)
    read = functools.partial(_drawn, dataset, chosen, stream if augment else None)
    if isinstance(dataset.train, Split):
        return next(read(count))
    return Examples(count, lambda: read(FISHER_CHUNK))


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
        draw: which estimate it is, zero or above, as in `fisher_samples`.
        count: number of examples, drawn without replacement.
        batch_size: examples in a batch; the last may be smaller.
        augment: whether to augment, where the data set says how. Default True.

    Raises:
        ValueError: an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more; got {batch_size}")
    chosen = _choose(dataset, count, _stream(seed, _NORM, draw))
    stream = functools.partial(_stream, seed, _NORM_AUGMENT, draw)
    return _drawn(dataset, chosen, stream if augment else None, batch_size)


def _choose(dataset: DataSet, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of training examples, drawn without replacement [count]."""
    total = dataset.num_train
    if not 1 <= count <= total:
        raise ValueError(
            f"count: expected 1 to {total}, the training examples of {dataset.name}; "
            f"got {count}"
        )
    return rng.permutation(total)[:count]


def _check_shard(shard: Shard) -> None:
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(
            f"shard: expected (index, count) with 0 <= index < count; got {shard}"
        )


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


def _drawn(
    dataset: DataSet,
    chosen: np.ndarray,
    stream: Callable[..., np.random.Generator] | None,
    batch_size: int,
) -> Iterator[Batch]:
    """Training examples by index, augmented if there is a stream."""
    split = dataset.train
    if isinstance(split, ImageStream):
        return _read(dataset, split, chosen, batch_size, stream)
    rng = stream() if stream else None  # all batches draw from it in turn
    return (
        _gather(dataset, split, chosen[start : start + batch_size], rng)
        for start in range(0, len(chosen), batch_size)
    )


def _read(
    dataset: DataSet,
    split: ImageStream,
    order: np.ndarray,
    batch_size: int,
    randomness: Randomness | None,
) -> Iterator[Batch]:
    """Training examples in files by index."""
    finish = functools.partial(normalize, dataset)
    batches = split.read(order, batch_size, randomness, substitute=True, finish=finish)
    return ({"image": b["image"], "label": b["label"]} for b in batches)


def _gather(
    dataset: DataSet,
    split: Split,
    chosen: np.ndarray,
    rng: np.random.Generator | None,
    rows: slice = slice(None),
) -> Batch:
    """Rows of the examples in memory at `chosen`, augmented if there is a generator.

    Augmentation is drawn for all of `chosen`, so that a row does not depend on `rows`.
    """
    if rng is not None and dataset.augment is not None:
        images = dataset.augment(rng, split.images[chosen])[rows]
    else:
        images = split.images[chosen[rows]]
    return {
        "image": normalize(dataset, images),
        "label": split.labels[chosen[rows]],
    }


def _test_batch(dataset: DataSet, split: Split, chosen: np.ndarray) -> Batch:
    """Test examples in memory by index, zeros of weight 0 for `NO_IMAGE`."""
    present = chosen != NO_IMAGE
    image = normalize(dataset, split.images[chosen])
    image[~present] = 0
    label = np.where(present, split.labels[chosen], 0)
    return {"image": image, "label": label, "weight": present.astype(np.float32)}
