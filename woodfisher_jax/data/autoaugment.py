"""AutoAugment: pairs of changes to an image that a search found to help on ImageNet.

Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data" (CVPR 2019),
the ImageNet policy of its appendix.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Change(NamedTuple):
    """One change of a pair.

    Attributes:
        operation: a key of `OPERATIONS`.
        probability: with which it is made.
        level: its strength, 0 to 9; not used by operations without one.
    """

    operation: str
    probability: float
    level: int = 0


POLICY: tuple[tuple[Change, Change], ...] = (
    (Change("posterize", 0.4, 8), Change("rotate", 0.6, 9)),
    (Change("solarize", 0.6, 5), Change("autocontrast", 0.6)),
    (Change("equalize", 0.8), Change("equalize", 0.6)),
    (Change("posterize", 0.6, 7), Change("posterize", 0.6, 6)),
    (Change("equalize", 0.4), Change("solarize", 0.2, 4)),
    (Change("equalize", 0.4), Change("rotate", 0.8, 8)),
    (Change("solarize", 0.6, 3), Change("equalize", 0.6)),
    (Change("posterize", 0.8, 5), Change("equalize", 1.0)),
    (Change("rotate", 0.2, 3), Change("solarize", 0.6, 8)),
    (Change("equalize", 0.6), Change("posterize", 0.4, 6)),
    (Change("rotate", 0.8, 8), Change("color", 0.4, 0)),
    (Change("rotate", 0.4, 9), Change("equalize", 0.6)),
    (Change("equalize", 0.0), Change("equalize", 0.8)),
    (Change("invert", 0.6), Change("equalize", 1.0)),
    (Change("color", 0.6, 4), Change("contrast", 1.0, 8)),
    (Change("rotate", 0.8, 8), Change("color", 1.0, 2)),
    (Change("color", 0.8, 8), Change("solarize", 0.8, 7)),
    (Change("sharpness", 0.4, 7), Change("invert", 0.6)),
    (Change("shear_x", 0.6, 5), Change("equalize", 1.0)),
    (Change("color", 0.4, 0), Change("equalize", 0.6)),
    (Change("equalize", 0.4), Change("solarize", 0.2, 4)),
    (Change("solarize", 0.6, 5), Change("autocontrast", 0.6)),
    (Change("invert", 0.6), Change("equalize", 1.0)),
    (Change("color", 0.6, 4), Change("contrast", 1.0, 8)),
    (Change("equalize", 0.8), Change("equalize", 0.6)),
)
"""The pairs, one of which is drawn for each image."""


Operation = Callable[[Any, float, int], Any]
"""Changes a Pillow image; takes the strength in [0, 1] and the sign, 1 or -1."""


def autoaugment(image: Any, rng: np.random.Generator) -> Any:
    """Makes the changes of one pair of `POLICY`, each with its probability.

    Args:
        image: a Pillow image in mode RGB.
        rng: draws the pair, which of its changes are made, and their signs.

    Returns:
        A Pillow image of the same size.
    """
    for change in POLICY[rng.integers(len(POLICY))]:
        made, sign = rng.random() < change.probability, rng.choice((-1, 1))
        if made:
            image = OPERATIONS[change.operation](image, change.level / 9, int(sign))
    return image


def _shear_x(image: Any, strength: float, sign: int) -> Any:
    """Shifts rows, by up to 0.3 of their distance from the top."""
    from PIL import Image

    slope = 0.3 * strength * sign
    return image.transform(image.size, Image.Transform.AFFINE, (1, slope, 0, 0, 1, 0))


def _rotate(image: Any, strength: float, sign: int) -> Any:
    """Turns about the middle, by up to 30 degrees."""
    return image.rotate(30 * strength * sign)


def _of_image_ops(
    name: str, argument: Callable[[float], int] | None = None
) -> Operation:
    """A function of Pillow's ImageOps, with an argument that depends on the level."""

    def operation(image: Any, strength: float, sign: int) -> Any:
        from PIL import ImageOps

        arguments = () if argument is None else (argument(strength),)
        return getattr(ImageOps, name)(image, *arguments)

    return operation


def _enhance(name: str) -> Operation:
    """A property of an image, times 0.1 to 1.9."""

    def operation(image: Any, strength: float, sign: int) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * strength * sign)

    return operation


OPERATIONS: dict[str, Operation] = {
    "shear_x": _shear_x,
    "rotate": _rotate,
    # Keeps the leading 8 to 4 bits of each channel.
    "posterize": _of_image_ops("posterize", lambda s: 8 - round(4 * s)),
    # Inverts pixels above a threshold of 255 to 0, for Pillow a whole number; a little
    # is subtracted since 255 · 2/3 is above 170 in floating point.
    "solarize": _of_image_ops("solarize", lambda s: math.ceil(255 * (1 - s) - 1e-6)),
    "autocontrast": _of_image_ops("autocontrast"),
    "equalize": _of_image_ops("equalize"),
    "invert": _of_image_ops("invert"),
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "sharpness": _enhance("Sharpness"),
}
"""Name of an operation to its function."""
