"""Data sets in memory, and batches of them as pure functions of a seed."""

import difflib
from collections.abc import Callable

from woodfisher_jax.data import cifar10, digits, mnist
from woodfisher_jax.data.array_records import DataMissingError
from woodfisher_jax.data.batches import (
    Batch,
    batch_norm_batches,
    fisher_samples,
    normalize,
    steps_per_epoch,
    test_batches,
    train_batch,
)
from woodfisher_jax.data.dataset import DataSet, Progress, Split

__all__ = [
    "DATASETS",
    "Batch",
    "DataMissingError",
    "DataSet",
    "Progress",
    "Split",
    "batch_norm_batches",
    "fisher_samples",
    "load",
    "normalize",
    "steps_per_epoch",
    "test_batches",
    "train_batch",
]

DATASETS: dict[str, Callable[[str | None, Progress | None], DataSet]] = {
    "digits": digits.load,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
}
"""Name of a data set to the function (data_dir, progress) that loads it."""


def load(
    name: str, *, data_dir: str | None = None, progress: Progress | None = None
) -> DataSet:
    """Loads a data set into memory.

    Args:
        name: a key of `DATASETS`.
        data_dir: the folder with the data sets that TFDS prepared; None takes the
            environment variable TFDS_DATA_DIR, and without that
            `~/tensorflow_datasets`. Digits need none.
        progress: called now and then with (label, done, total), such as
            ("mnist train", 5000, 60000). Default: nothing.

    Returns:
        The data set.

    Raises:
        ValueError: there is no data set of that name.
        DataMissingError: its files are absent, incomplete or damaged.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(DATASETS)
        raise ValueError(f"name: expected one of {names}; got {name!r}{hint}")
    return DATASETS[name](data_dir, progress)
