"""Random changes to training images."""

import numpy as np

PADDING = 4
"""Pixels of black on each side before a crop."""


def crop_and_flip(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Crops each image at a random place out of its padded self, and may mirror it.

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
    count, height, width, _ = images.shape
    places = 2 * PADDING + 1
    top, left = rng.integers(places, size=(2, count))
    mirrored = rng.random((count, 1, 1, 1)) < 0.5

    border = (PADDING, PADDING)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (height, width), axis=(1, 2)
    )  # [n, places, places, c, h, w]
    cropped = np.moveaxis(windows[np.arange(count), top, left], 1, -1)
    return np.where(mirrored, cropped[:, :, ::-1], cropped)
