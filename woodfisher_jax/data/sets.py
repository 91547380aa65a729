"""The data sets by name: where each comes from, and the constants of its pixels."""

import difflib
import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from woodfisher_jax.data.array_records import (
    PREPARED_HERE,
    DataMissingError,
    RecordImages,
    data_root,
    open_images,
    unusable,
)
from woodfisher_jax.data.augment import crop_and_flip
from woodfisher_jax.data.dataset import Augment, DataSet, Progress, Split
from woodfisher_jax.data.decoded import kept
from woodfisher_jax.data.generated import write_once
from woodfisher_jax.data.image_folder import ImageFiles, find_images
from woodfisher_jax.data.images import to_rgb
from woodfisher_jax.data.streams import ImageOptions, ImageStream
from woodfisher_jax.extras import require

_CHUNK = 5_000  # images between two calls of progress

_MANY = 2**24  # more examples than a run asks for

Source = Split | RecordImages | ImageFiles

Opener = Callable[[str | None], tuple[Source, Source, int]]
"""Maps data_dir to training images, test images and the number of classes."""


def _digits(data_dir: str | None) -> tuple[Split, Split, int]:
    """1,437 and 360 images, as `train_test_split(test_size=0.2, random_state=0)`."""
    bunch = require("sklearn.datasets", "the data set digits").load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # RandomState: NumPy promises its stream for ever, and not that of default_rng.
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = order[:360], order[360:]
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def _records(name: str) -> Opener:
    """A data set of TFDS by the name of its folder."""
    return lambda data_dir: open_images(name, data_root(data_dir))


def _folder(name: str, *, may_split: bool = False) -> Opener:
    """Files in folders of their classes; the name is for messages."""

    def find(data_dir: str | None) -> tuple[ImageFiles, ImageFiles, int]:
        train, test = find_images(name, data_dir, may_split=may_split)
        return train, test, len(train.classes)

    return find


def _generated(form: str, opener: Opener) -> Opener:
    return lambda data_dir: opener(str(write_once(form, data_dir)))


def _png(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.atleast_3d(np.asarray(image))  # Pillow drops the axis of one channel


def _rgb_32(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if image.size != (32, 32):
            raise ValueError(f"expected 32 x 32 pixels; got {image.size}")
        return np.asarray(to_rgb(image))


class Recipe(NamedTuple):
    """How a data set is opened; `DataSet` explains the constants.

    Attributes:
        open: see `Opener`.
        decode: from an image file to uint8 [h, w, c], where the images are held in
            memory; None where they stay in their files.
        mean: with `std`, of sets in memory; those of images in files are options.
        shape: of an image, of sets in memory.
    """

    open: Opener
    decode: Callable[[bytes], np.ndarray] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: Augment | None = None
    scale: float = 255.0
    shape: tuple[int, int, int] = (32, 32, 3)


_HALF = (0.5, 0.5, 0.5)
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), crop_and_flip)

SETS: dict[str, Recipe] = {
    "digits": Recipe(_digits, _png, (0.30559,), (0.37630,), None, 16.0, (8, 8, 1)),
    "mnist": Recipe(_records("mnist"), _png, (0.1307,), (0.3081,), shape=(28, 28, 1)),
    # The original's checkpoint was trained with these constants: 91.43 % on the test
    # images. The original's own loader has (0.4914, 0.4822, 0.4465) and (0.2023,
    # 0.1994, 0.2010), which give that checkpoint 53.52 %.
    "cifar10": Recipe(_records("cifar10"), _png, _HALF, _HALF, crop_and_flip),
    "cifar100": Recipe(_records("cifar100"), _png, *_CIFAR100),
    "cifar100_folder": Recipe(_folder("cifar100_folder"), _rgb_32, *_CIFAR100),
    "imagenet": Recipe(_records("imagenet2012")),
    "imagenet_folder": Recipe(_folder("imagenet_folder")),
    "imagenette": Recipe(_records("imagenette/full-size-v2")),
    "imagenette_folder": Recipe(_folder("imagenette_folder")),
    "image_folder": Recipe(_folder("image_folder", may_split=True)),
    "generated_images": Recipe(_generated("images", _folder("generated_images"))),
    "generated_records": Recipe(_generated("records", _records("imagenet2012"))),
}
"""Every data set, by name."""

IN_FILES = tuple(name for name, recipe in SETS.items() if recipe.decode is None)
"""Names of the data sets whose images stay in their files."""


def load(
    name: str,
    *,
    data_dir: str | None = None,
    progress: Progress | None = None,
    options: ImageOptions | None = None,
) -> DataSet:
    """Loads a data set into memory, or opens one that stays in its files.

    Args:
        name: a key of `SETS`.
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
    given = options or ImageOptions()
    _check_name(name)
    opener, decode, mean, std, augment, scale, _ = SETS[name]
    if decode is None:
        require("grain", f"the data set {name}")
        mean, std = given.mean, given.std
    elif given.autoaugment:
        raise ValueError(
            f"autoaugment: expected False for {name}, which is augmented in memory; "
            f"only {', '.join(IN_FILES)} have it"
        )

    def split(source: Source, label: str) -> Split | ImageStream:
        if isinstance(source, Split):
            return source
        if decode is None:
            return ImageStream(label, source, given)
        into_memory = partial(_into_memory, source, label, decode, progress)
        if isinstance(source, RecordImages):
            return kept(source, into_memory)
        return into_memory()

    train, test, num_classes = opener(data_dir)
    try:
        splits = split(train, f"{name} train"), split(test, f"{name} test")
    except ValueError as error:
        if name in PREPARED_HERE:
            raise unusable(name, data_root(data_dir), str(error)) from error
        raise DataMissingError(f"{name}: {error}") from error
    folders = {one.folder for one in (train, test) if isinstance(one, ImageFiles)}
    split_off = len(folders) == 1
    return DataSet(name, *splits, num_classes, scale, mean, std, augment, split_off)


def _check_name(name: str) -> None:
    if name not in SETS:
        close = difflib.get_close_matches(name.lower(), SETS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name: expected one of {', '.join(SETS)}; got {name!r}{hint}")


def stand_in(name: str, num_classes: int, options: ImageOptions) -> DataSet:
    """Black images of the shape that a data set has, where only shapes count.

    Args:
        name: a key of `SETS`.
        num_classes: number of classes.
        options: of which `image_size` counts, for images in files.

    Returns:
        Many examples, which take no memory.

    Raises:
        ValueError: there is no data set of that name.
    """
    _check_name(name)
    recipe, side = SETS[name], options.image_size
    shape = (side, side, 3) if recipe.decode is None else recipe.shape
    pixel, label = np.zeros((), np.uint8), np.zeros((), np.int32)
    split = Split(
        np.broadcast_to(pixel, (_MANY, *shape)), np.broadcast_to(label, _MANY)
    )
    none = (0.0,) * shape[-1]
    return DataSet(name, split, split, num_classes, recipe.scale, none, none, None)


def _into_memory(
    source: RecordImages | ImageFiles,
    label: str,
    decode: Callable[[bytes], np.ndarray],
    progress: Progress | None,
) -> Split:
    """Decodes all images of a split in order; a damaged one is a ValueError."""
    # In one thread: most of the work holds the interpreter lock.
    images, labels = np.empty(0, np.uint8), np.empty(source.size, np.int32)
    done = 0
    try:
        for content, labels[done] in source.read_all():
            image = decode(content)
            if not done:
                images = np.empty((source.size, *image.shape), np.uint8)
            images[done] = image
            done += 1
            if progress and (done % _CHUNK == 0 or done == source.size):
                progress(label, done, source.size)
    # Pillow has a SyntaxError for some files, array_record a RuntimeError.
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise ValueError(f"{source.place(done)} cannot be read: {error}") from error
    return Split(images, labels)
