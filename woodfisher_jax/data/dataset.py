"""A data set: two splits, in memory or in files, and the constants of its pixels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from woodfisher_jax.data.streams import ImageStream

Progress = Callable[[str, int, int], None]
"""Called now and then while data loads, with (label, done, total) in examples."""

Augment = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Maps a generator and uint8 images [n, h, w, c] to as many augmented ones."""


class Split(NamedTuple):
    """Examples of one split in host memory, in an order that never changes.

    Attributes:
        images: uint8 [n, h, w, c], not yet normalised.
        labels: int32 [n], from 0 to `num_classes` - 1.
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels


class DataSet(NamedTuple):
    """A data set.

    Attributes:
        name: the name it was loaded by.
        train: the examples to train on, and to estimate the Fisher matrix from.
        test: the examples to evaluate on.
        num_classes: number of classes.
        scale: the pixel value that counts as one (255, or 16 for digits).
        mean: mean of pixel / scale to subtract, one number a channel.
        std: standard deviation to divide by after that, one number a channel.
        augment: applied to each training batch of a set in memory before it is
            normalised; None leaves it as it is. Images in files are augmented one by
            one as they are read.
        split_off: whether the test examples are some of the training folder, which
            has no others.
    """

    name: str
    train: Split | ImageStream
    test: Split | ImageStream
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None
    split_off: bool = False

    @property
    def num_train(self) -> int:
        """Number of training examples."""
        return self.train.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image in a batch."""
        return self.train.image_shape
