"""What a data set is here: two splits in memory and how to normalise them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Progress = Callable[[str, int, int], None]
"""Called now and then while data loads, with (label, done, total) in examples."""

Augment = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Maps a generator and uint8 images [n, h, w, c] to as many augmented ones."""


class Split(NamedTuple):
    """Examples of one split, in an order that never changes.

    Attributes:
        images: uint8 [n, h, w, c], not yet normalised.
        labels: int32 [n], from 0 to `num_classes` - 1.
    """

    images: np.ndarray
    labels: np.ndarray


class DataSet(NamedTuple):
    """A data set in host memory.

    Attributes:
        name: the name it was loaded by.
        train: the examples to train on, and to estimate the Fisher matrix from.
        test: the examples to evaluate on.
        num_classes: number of classes.
        scale: the pixel value that counts as one (255, or 16 for digits).
        mean: mean of pixel / scale to subtract, one number a channel.
        std: standard deviation to divide by after that, one number a channel.
        augment: what training does to a batch of images before it normalises them;
            None leaves them as they are.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None
