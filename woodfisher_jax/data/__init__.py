"""Data sets in memory or in files, and batches of them as pure functions of a seed."""

import difflib
from collections.abc import Callable

from woodfisher_jax.data import cifar10, cifar100, digits, mnist
from woodfisher_jax.data.array_records import DataMissingError
from woodfisher_jax.data.batches import (
    Batch,
    Shard,
    batch_norm_batches,
    epoch_batches,
    fisher_samples,
    normalize,
    steps_per_epoch,
    test_batches,
    train_batch,
)
from woodfisher_jax.data.dataset import DataSet, Progress, Split
from woodfisher_jax.data.imagenet import STREAMED
from woodfisher_jax.data.streams import (
    BadImagesError,
    ImageOptions,
    ImageStream,
    check_options,
)

__all__ = [
    "IN_MEMORY",
    "STREAMED",
    "BadImagesError",
    "Batch",
    "DataMissingError",
    "DataSet",
    "ImageOptions",
    "ImageStream",
    "Progress",
    "Shard",
    "Split",
    "batch_norm_batches",
    "epoch_batches",
    "fisher_samples",
    "load",
    "normalize",
    "steps_per_epoch",
    "test_batches",
    "train_batch",
]

IN_MEMORY: dict[str, Callable[[str | None, Progress | None], DataSet]] = {
    "digits": digits.load,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "cifar100": cifar100.load,
    "cifar100_folder": cifar100.load_folder,
}
"""Name of a data set to the function (data_dir, progress) that loads it."""


def load(
    name: str,
    *,
    data_dir: str | None = None,
    progress: Progress | None = None,
    options: ImageOptions | None = None,
) -> DataSet:
    """Loads a data set into memory, or opens one that stays in its files.

    Args:
        name: a key of `IN_MEMORY` or of `STREAMED`.
        data_dir: the folder with the data sets that TFDS prepared; None takes the
            environment variable TFDS_DATA_DIR, and without that
            `~/tensorflow_datasets`. Digits need none; those in folders need the folder
            that holds `train` and `val`.
        progress: called now and then with (label, done, total), such as
            ("mnist train", 5000, 60000), while one is read into memory. Default:
            nothing.
        options: how images in files are read. Default `ImageOptions()`.

    Returns:
        The data set.

    Raises:
        ValueError: there is no data set of that name, or an option is out of range.
        DataMissingError: its files are absent, incomplete or damaged.
    """
    options = options or ImageOptions()
    names = [*IN_MEMORY, *STREAMED]
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"name: expected one of {', '.join(names)}; got {name!r}{hint}"
        )
    check_options(options)
    if name in STREAMED:
        return STREAMED[name](data_dir, options)
    if options.autoaugment:
        raise ValueError(
            f"autoaugment: expected False for {name}, which is augmented in memory; "
            f"only {', '.join(STREAMED)} have it"
        )
    return IN_MEMORY[name](data_dir, progress)
