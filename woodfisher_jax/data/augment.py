"""Random changes to training images."""

import numpy as np

PADDING = 4
"""Pixels of black on each side before a crop."""


def crop_and_flip(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Crops each padded image at a random place, and mirrors half of them.

    Each image is padded with `PADDING` black pixels on every side, a window of the
    original size is cut out at one of the (2 `PADDING` + 1)^2 places, and half of the
    windows are mirrored left to right; all choices are uniform and independent.

    Args:
        rng: where the choices come from.
        images: uint8 [n, h, w, c], before normalisation: the padding is the pixel
            value 0.

    Returns:
        uint8 [n, h, w, c].
    """
    count = len(images)
    top, left = rng.integers(2 * PADDING + 1, size=(2, count))
    mirrored = rng.random((count, 1, 1, 1)) < 0.5
    cropped = _windows(images, PADDING, top, left)
    return np.where(mirrored, cropped[:, :, ::-1], cropped)


def shift(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Moves half of the images by at most one pixel across and down.

    For small images whose mirror images mean something else, such as digits. Which
    images move, and to which of the nine places, is uniform and independent.

    Args:
        rng: where the choices come from.
        images: uint8 [n, h, w, c], before normalisation.

    Returns:
        uint8 [n, h, w, c].
    """
    moved = rng.random(len(images)) < 0.5
    top, left = np.where(moved, rng.integers(3, size=(2, len(images))), 1)
    return _windows(images, 1, top, left)


def _windows(
    images: np.ndarray, padding: int, top: np.ndarray, left: np.ndarray
) -> np.ndarray:
    """The part of each padded image that begins at its own row and column."""
    _, height, width, _ = images.shape
    border = (padding, padding)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (height, width), axis=(1, 2)
    )  # [n, places, places, c, h, w]
    return np.moveaxis(windows[np.arange(len(images)), top, left], 1, -1)
