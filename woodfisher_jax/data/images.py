"""From the bytes of an image file to a square of colour pixels, by Pillow.

Training takes a random window of an image, evaluation its middle, as torchvision's
reference training does; evaluation gives the same pixels.
"""

import io
import math
from typing import Any

import numpy as np

AREA = (0.08, 1.0)
"""Share of the image that a random window covers."""

ASPECT = (3 / 4, 4 / 3)
"""Width over height of a random window."""

_TRIES = 10  # windows that may turn out not to fit

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a window, in pixels."""


def training_crop(content: bytes, size: int, rng: np.random.Generator) -> Any:
    """Scales a random window of an image to a square, and mirrors half of them.

    Args:
        content: a file of any format that Pillow reads.
        size: side of the square in pixels.
        rng: where the window and the mirroring come from.

    Returns:
        A Pillow image, RGB, size x size.

    Raises:
        OSError: Pillow cannot read it. It has other exceptions for some formats.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        box = random_window(image.size, rng)
        mirrored = rng.random() < 0.5
        crop = _scaled(image, box, size)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop


def central_crop(content: bytes, size: int, short_side: int) -> Any:
    """Scales an image and cuts the middle out; arguments as in `training_crop`.

    Args:
        content: the image file.
        size: side of the square in pixels.
        short_side: the image's shorter side before the cut, at least `size`.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        shorter = min(width, height)
        scaled = to_rgb(image).resize(
            (short_side * width // shorter, short_side * height // shorter),
            Image.Resampling.BILINEAR,
        )
    left, top = (round((side - size) / 2) for side in scaled.size)
    return scaled.crop((left, top, left + size, top + size))


def random_window(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Draws a window with a share of `AREA` and a width over height in `ASPECT`.

    The share and the logarithm of width over height are uniform. A window that does not
    fit is drawn again; after ten tries it is the largest one in the middle with the
    nearest ratio allowed.

    Args:
        size: width and height of the image.
        rng: where the choices come from.

    Returns:
        The window; its sides are whole numbers.
    """
    width, height = size
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(*np.log(ASPECT)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(rng.integers(width - wide + 1))
            top = int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    ratio = min(max(width / height, ASPECT[0]), ASPECT[1])
    wide = min(width, max(1, round(height * ratio)))
    high = min(height, max(1, round(width / ratio)))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def to_rgb(image: Any) -> Any:
    """Makes three channels of any image: grey, palette, CMYK, with or without alpha.

    Transparency is dropped, not blended, as PyTorch's image folders do.

    Args:
        image: a Pillow image.

    Returns:
        The image in mode RGB.
    """
    if image.mode == "RGB":
        return image  # and not a copy, which is what Pillow's own conversion gives
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode == "P":  # its transparency can be bytes, which only RGBA takes
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled(image: Any, box: Box, size: int) -> Any:
    """A window of an image, scaled to size x size."""
    from PIL import Image

    width, height = image.size
    left, top, right, bottom = box
    # A JPEG decodes in less time at a half, a quarter or an eighth of its size; Pillow
    # takes the smallest of these that is at least what it is given here.
    needed = (width * size / (right - left), height * size / (bottom - top))
    image.draft(None, tuple(map(math.ceil, needed)))
    across, down = image.size[0] / width, image.size[1] / height
    return to_rgb(image).resize(
        (size, size),
        Image.Resampling.BILINEAR,
        box=(left * across, top * down, right * across, bottom * down),
    )
