"""The data sets by name: where each comes from, and the constants of its pixels."""

import difflib
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from woodfisher_jax.data.array_records import (
    DataMissingError,
    RecordImages,
    data_root,
    open_images,
    unusable,
)
from woodfisher_jax.data.augment import crop_and_flip
from woodfisher_jax.data.dataset import Augment, DataSet, Progress, Split
from woodfisher_jax.data.generated import write_once
from woodfisher_jax.data.image_folder import ImageFiles, find_images
from woodfisher_jax.data.images import to_rgb
from woodfisher_jax.data.streams import ImageOptions, ImageSource, ImageStream
from woodfisher_jax.extras import require

_CHUNK = 5_000  # images between two calls of progress

Splits = tuple[Split, Split, int]
"""Training split, test split, number of classes."""

Sources = tuple[ImageSource, ImageSource, int]
"""The same of images that stay in their files."""


def _digits(data_dir: str | None, progress: Progress | None) -> Splits:
    """1,437 training and 360 test images: `train_test_split(..., random_state=0)`."""
    bunch = require("sklearn.datasets", "the data set digits").load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # RandomState: NumPy promises its stream for ever, and not that of default_rng.
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = order[:360], order[360:]
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def _tfds(name: str) -> Callable[[str | None, Progress | None], Splits]:
    """PNG images in the array_record files of TFDS."""

    def read(data_dir: str | None, progress: Progress | None) -> Splits:
        root = data_root(data_dir)
        train, test, num_classes = open_images(name, root)
        try:
            return (
                _into_memory(train, f"{name} train", _png, progress),
                _into_memory(test, f"{name} test", _png, progress),
                num_classes,
            )
        except ValueError as error:
            raise unusable(name, root, str(error)) from error

    return read


def _cifar100_folder(data_dir: str | None, progress: Progress | None) -> Splits:
    train, test = find_images("cifar100_folder", data_dir)
    try:
        return (
            _into_memory(train, "cifar100_folder train", _colour_32, progress),
            _into_memory(test, "cifar100_folder test", _colour_32, progress),
            len(train.classes),
        )
    except ValueError as error:
        raise DataMissingError(f"cifar100_folder: {error}") from error


def _into_memory(
    source: RecordImages | ImageFiles,
    label: str,
    decode: Callable[[bytes], np.ndarray],
    progress: Progress | None,
) -> Split:
    """Decodes all images of a split in order; one that is damaged is a ValueError."""
    # In one thread: most of the work holds the interpreter lock.
    images, labels = None, np.empty(source.size, np.int32)
    done = 0
    try:
        for content, labels[done] in source.read_all():
            image = decode(content)
            if images is None:
                images = np.empty((source.size, *image.shape), np.uint8)
            images[done] = image
            done += 1
            if progress and (done % _CHUNK == 0 or done == source.size):
                progress(label, done, source.size)
    # Pillow has a SyntaxError for some files, array_record a RuntimeError.
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise ValueError(f"{source.place(done)} cannot be read: {error}") from error
    assert images is not None, "a split has an image at least"
    return Split(images, labels)


def _png(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.atleast_3d(np.asarray(image))  # Pillow drops the axis of one channel


def _colour_32(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if image.size != (32, 32):
            raise ValueError(f"expected 32 x 32 pixels; got {image.size}")
        return np.asarray(to_rgb(image))


class Recipe(NamedTuple):
    """A function of (data_dir, progress), and the constants of `DataSet`."""

    read: Callable[[str | None, Progress | None], Splits]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None = None


_HALF = (0.5, 0.5, 0.5)
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), crop_and_flip)

IN_MEMORY: dict[str, Recipe] = {
    "digits": Recipe(_digits, 16.0, (0.30559,), (0.37630,)),
    "mnist": Recipe(_tfds("mnist"), 255.0, (0.1307,), (0.3081,)),
    # The original's checkpoint was trained with these constants: 91.43 % on the test
    # images. The original's own loader has (0.4914, 0.4822, 0.4465) and (0.2023,
    # 0.1994, 0.2010), which give that checkpoint 53.52 %.
    "cifar10": Recipe(_tfds("cifar10"), 255.0, _HALF, _HALF, crop_and_flip),
    "cifar100": Recipe(_tfds("cifar100"), 255.0, *_CIFAR100),
    "cifar100_folder": Recipe(_cifar100_folder, 255.0, *_CIFAR100),
}
"""Name of a data set that is read into memory to how."""


def _records(name: str) -> Callable[[str | None], Sources]:
    return lambda data_dir: open_images(name, data_root(data_dir))


def _folder(name: str) -> Callable[[str | None], Sources]:
    def find(data_dir: str | None) -> Sources:
        train, test = find_images(name, data_dir)
        return train, test, len(train.classes)

    return find


IN_FILES: dict[str, Callable[[str | None], Sources]] = {
    "imagenet": _records("imagenet2012"),
    "imagenet_folder": _folder("imagenet_folder"),
    "imagenette": _records("imagenette/full-size-v2"),
    "imagenette_folder": _folder("imagenette_folder"),
    "image_folder": _folder("image_folder"),
    "generated_images": lambda data_dir: _folder("generated_images")(
        str(write_once("images", data_dir))
    ),
    "generated_records": lambda data_dir: _records("imagenet2012")(
        str(write_once("records", data_dir))
    ),
}
"""Name of a data set that stays in its files to the function (data_dir) that opens it.
"""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's channels, on a scale from 0 to 1; pretrained networks expect them."""


def load(
    name: str,
    *,
    data_dir: str | None = None,
    progress: Progress | None = None,
    options: ImageOptions | None = None,
) -> DataSet:
    """Loads a data set into memory, or opens one that stays in its files.

    Args:
        name: a key of `IN_MEMORY` or of `IN_FILES`.
        data_dir: the folder with the data sets that TFDS prepared; None takes the
            environment variable TFDS_DATA_DIR, and without that
            `~/tensorflow_datasets`. Sets in folders: the folder with both splits.
            Generated sets: where they are kept, by default the user's cache. Digits:
            not used.
        progress: called now and then with (label, done, total), such as
            ("mnist train", 5000, 60000), while one is read into memory. Default:
            nothing.
        options: how images in files are read. Default `ImageOptions()`.

    Returns:
        The data set.

    Raises:
        ValueError: there is no data set of that name, or an option is out of range.
        DataMissingError: its files are absent, incomplete or damaged.
        MissingExtraError: it needs a package that is not installed.
    """
    options = options or ImageOptions()
    names = [*IN_MEMORY, *IN_FILES]
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"name: expected one of {', '.join(names)}; got {name!r}{hint}"
        )
    options.check()
    if name in IN_MEMORY:
        if options.autoaugment:
            raise ValueError(
                f"autoaugment: expected False for {name}, which is augmented in "
                f"memory; only {', '.join(IN_FILES)} have it"
            )
        read, *constants = IN_MEMORY[name]
        return DataSet(name, *read(data_dir, progress), *constants)
    require("grain", f"the data set {name}")
    train, test, num_classes = IN_FILES[name](data_dir)
    return DataSet(
        name,
        ImageStream(f"{name} train", train, options),
        ImageStream(f"{name} test", test, options),
        num_classes,
        scale=255.0,
        mean=MEAN,
        std=STD,
        augment=None,
    )
