"""Images read from files as they are needed, decoded ahead of time by Grain.

A stream reads a list of image indices. The random numbers of an image follow from the
seed, the use and the index, so any part of a list can be read alone with the same
result, and the place in the list is all the state there is. Threads or processes decide
only how soon it is read.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from woodfisher_jax.data.autoaugment import autoaugment
from woodfisher_jax.data.images import central_crop, training_crop
from woodfisher_jax.options import OptionError, Options, option

logger = logging.getLogger(__name__)

NO_IMAGE = -1
"""Takes the place of an index where a batch is to be filled up."""


class BadImagesError(OSError):
    """More images cannot be read than a run is willing to do without."""


MOST_PIXELS = 65_535
"""Of a side of an image: the most that JPEG has."""


@dataclasses.dataclass(frozen=True)
class ImageOptions(Options):
    """How images are read from files."""

    image_size: int = option(
        224,
        "Side of the square that the model sees, in pixels; this and all that follow "
        "are of data sets in files.",
        least=1,
        most=MOST_PIXELS,
    )
    resize: int | None = option(
        None,
        "Shorter side of a test image before its middle is cut out, in pixels, at "
        "least image_size; default 8/7 of that, which is 256 for 224.",
        least=1,
        most=MOST_PIXELS,
    )
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406),
        "Subtracted from red, green and blue on a scale from 0 to 1; the default is "
        "ImageNet's.",
        least=0,
        most=1,
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225),
        "What red, green and blue are then divided by; the default is ImageNet's.",
        above=0,
    )
    autoaugment: bool = option(
        False, "AutoAugment of training images, besides crops and flips."
    )
    workers: int = option(
        0,
        "Processes that decode images; 0 for threads, one a core.",
        least=0,
        most=1024,
    )
    prefetch: int = option(
        2,
        "Batches made ready ahead, by each process if there are any.",
        least=1,
        most=1024,
    )
    max_bad_images: int = option(
        10, "Files of a split that may be unreadable and are left out.", least=0
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            OptionError: Naming the option, what was expected and what came.
        """
        super().__post_init__()
        if self.short_side < self.image_size:
            raise OptionError(
                "resize",
                f"resize={self.resize}; expected image_size={self.image_size} or more",
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != 3:
                expected = "three numbers, such as (0.5, 0.5, 0.5)"
                raise OptionError(name, f"{name}={value}; expected {expected}")

    @property
    def short_side(self) -> int:
        """The value of ``resize``, or its default, in pixels."""
        return self.resize or round(8 * self.image_size / 7)


class ImageSource(Protocol):
    """Encoded images with labels, by index; can be pickled."""

    @property
    def size(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the content of an image file and its label."""

    def place(self, index: int) -> str:
        """Returns where an image is, for messages."""


Randomness = Callable[[int], np.random.Generator]
"""Gives the generator of an image by its index; can be pickled."""


@dataclasses.dataclass(frozen=True)
class ImageStream:
    """One split of a data set that stays in its files.

    Attributes:
        name: the data set and the split, for messages.
        source: where the files are.
        options: how they are read.
        bad: place of each image that could not be read so far, with the reason.
    """

    name: str
    source: ImageSource
    options: ImageOptions
    bad: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of images."""
        return self.source.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image in a batch."""
        return self.options.image_size, self.options.image_size, 3

    def read(
        self,
        order: np.ndarray,
        batch_size: int,
        randomness: Randomness | None,
        *,
        substitute: bool,
        finish: Callable[[np.ndarray], np.ndarray],
    ) -> Iterator[dict[str, np.ndarray]]:
        """Reads images in a given order, ahead of the caller.

        An image that cannot be read is named in the log, once.

        Args:
            order: index of each image, or `NO_IMAGE` for zeros.
            batch_size: images in a batch; the last may be smaller.
            randomness: for random crops, flips and AutoAugment; None for the middle of
                the image.
            substitute: whether the next readable image takes the place of one that is
                not; else zeros do.
            finish: what a batch of images uint8 [b, size, size, 3] is made into, a new
                array.

        Yields:
            'image', finished; 'label' int32 [b]; 'weight' float32 [b], 1 for an image
            and 0 for zeros.

        Raises:
            BadImagesError: more images than `options.max_bad_images` cannot be read.
        """
        reader = _Reader(self.source, self.options, order, randomness, substitute)
        batches = iter(_pipeline(reader, batch_size, finish))
        with contextlib.closing(batches):
            for batch in batches:
                self._note(batch.pop("bad"))
                yield batch

    def _note(self, found: list[tuple[str, str]]) -> None:
        """Logs images that could not be read; raises when there are too many."""
        for place, reason in found:
            if place not in self.bad:
                self.bad[place] = reason
                logger.warning(
                    "%s: image %s cannot be read (%s) and is left out; %d so far, at "
                    "most %d",
                    self.name,
                    place,
                    reason,
                    len(self.bad),
                    self.options.max_bad_images,
                )
        if len(self.bad) > self.options.max_bad_images or len(self.bad) == self.size:
            named = "\n".join(f"  {place}: {why}" for place, why in self.bad.items())
            raise BadImagesError(
                f"{self.name}: {len(self.bad)} images cannot be read, and "
                f"config.data.max_bad_images={self.options.max_bad_images} may be left "
                f"out; restore these files, or raise the limit:\n{named}"
            )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads and decodes the image at a position of the order; called by Grain."""

    source: ImageSource
    options: ImageOptions
    order: np.ndarray
    randomness: Randomness | None
    substitute: bool

    def __call__(self, position: int) -> dict[str, Any]:
        first = int(self.order[position])
        bad: list[tuple[str, str]] = []
        # One more than may be bad: then the limit is exceeded, whatever comes next.
        tries = self.options.max_bad_images + 1 if self.substitute else 1
        for step in range(tries if first != NO_IMAGE else 0):
            index = (first + step) % self.source.size
            try:
                content, label = self.source.read(index)
                image = self._pixels(content, index)
            # Pillow has no common class for what is wrong with a file, and a file that
            # is not an image can raise almost anything.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                bad.append((self.source.place(index), reason))
            else:
                return {"image": image, "label": label, "weight": 1.0, "bad": bad}
        size = self.options.image_size
        zeros = np.zeros((size, size, 3), np.uint8)
        return {"image": zeros, "label": 0, "weight": 0.0, "bad": bad}

    def _pixels(self, content: bytes, index: int) -> np.ndarray:
        """uint8 [size, size, 3] of an image."""
        size = self.options.image_size
        if self.randomness is None:
            return np.asarray(central_crop(content, size, self.options.short_side))
        rng = self.randomness(index)
        crop = training_crop(content, size, rng)
        if self.options.autoaugment:
            crop = autoaugment(crop, rng)
        return np.asarray(crop)


def _stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of examples; the bad images of all of them as one list."""
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
        "weight": np.array([example["weight"] for example in examples], np.float32),
        "bad": [each for example in examples for each in example["bad"]],
    }


def _pipeline(
    reader: _Reader, batch_size: int, finish: Callable[[np.ndarray], np.ndarray]
) -> Any:
    """Grain's iterable data set of batches, in order."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Grain has flags of its own for processes, which only a program of absl parses.
        flags.FLAGS.mark_as_parsed()
    options = reader.options
    examples = grain.MapDataset.range(len(reader.order)).map(reader)
    if options.workers:
        # Each process makes whole batches, so that their order does not depend on how
        # many processes there are.
        batches = (
            examples.batch(batch_size, batch_fn=_stack)
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
            .mp_prefetch(
                grain.MultiprocessingOptions(
                    options.workers, per_worker_buffer_size=options.prefetch
                )
            )
        )
    else:
        threads = os.cpu_count() or 1
        batches = examples.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        ).batch(batch_size, batch_fn=_stack)

    def finished(batch: dict[str, Any]) -> dict[str, Any]:
        # Copies: memory shared with another process is freed after this call.
        label, weight = np.array(batch["label"]), np.array(batch["weight"])
        image = finish(np.asarray(batch["image"]))
        image[weight == 0] = 0
        return {"image": image, "label": label, "weight": weight, "bad": batch["bad"]}

    # In a thread of its own: a batch of 256 images takes some 0.1 s to normalise.
    return grain.experimental.ThreadPrefetchIterDataset(
        batches.map(finished), prefetch_buffer_size=options.prefetch
    )
