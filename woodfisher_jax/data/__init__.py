"""Data sets in memory or in files, and batches of them as pure functions of a seed."""

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
)
from woodfisher_jax.data.dataset import DataSet, Progress, Split
from woodfisher_jax.data.sets import IN_FILES, SETS, load, stand_in
from woodfisher_jax.data.streams import BadImagesError, ImageOptions, ImageStream

__all__ = [
    "IN_FILES",
    "SETS",
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
    "stand_in",
    "steps_per_epoch",
    "test_batches",
]
