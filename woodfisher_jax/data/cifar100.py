"""CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 colour pixels."""

import io
from pathlib import Path

import numpy as np

from woodfisher_jax.data.array_records import DataMissingError, read_splits
from woodfisher_jax.data.augment import crop_and_flip
from woodfisher_jax.data.dataset import DataSet, Progress, Split
from woodfisher_jax.data.image_folder import ImageFiles, find_images
from woodfisher_jax.data.images import to_rgb

SIZE = 32
_CHUNK = 5_000  # files between two calls of progress


def load(data_dir: str | None = None, progress: Progress | None = None) -> DataSet:
    """Loads CIFAR-100 as TFDS prepared it, with its 100 fine labels.

    Args:
        data_dir: the folder with prepared data sets; see `array_records.data_root`.
        progress: called now and then with (label, done, total).

    Returns:
        The data set: images uint8 [n, 32, 32, 3], a hundred classes, random crops and
        mirroring in training.

    Raises:
        DataMissingError: the data is absent, incomplete or damaged.
    """
    train, test = read_splits("cifar100", data_dir, progress)
    return _data_set("cifar100", train, test, 100)


def load_folder(
    data_dir: str | None = None, progress: Progress | None = None
) -> DataSet:
    """Loads CIFAR-100, or any images of 32 x 32, from files in folders.

    Args:
        data_dir: the folder that holds train/<class>/ and test/<class>/ (or val).
        progress: called now and then with (label, done, total).

    Returns:
        The data set as `load` gives it, with as many classes as there are folders.

    Raises:
        DataMissingError: a folder is absent or empty, or a file is damaged or of
            another size.
    """
    if data_dir is None:
        raise DataMissingError(
            "cifar100_folder: expected the folder that holds train/<class>/ and "
            "test/<class>/; name it with --config.data.dir"
        )
    files = find_images("cifar100_folder", Path(data_dir).expanduser())
    train, test = (
        _read_files(split, label, progress)
        for split, label in zip(files, ("train", "test"), strict=True)
    )
    return _data_set("cifar100_folder", train, test, len(files[0].classes))


def _data_set(name: str, train: Split, test: Split, num_classes: int) -> DataSet:
    return DataSet(
        name=name,
        train=train,
        test=test,
        num_classes=num_classes,
        scale=255.0,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment=crop_and_flip,
    )


def _read_files(files: ImageFiles, label: str, progress: Progress | None) -> Split:
    """Decodes all files of a split; here a bad one is an error, as in a TFDS set."""
    from PIL import Image

    images = np.empty((files.size, SIZE, SIZE, 3), np.uint8)
    for index in range(files.size):
        try:
            with Image.open(io.BytesIO(files.read(index)[0])) as image:
                if image.size != (SIZE, SIZE):
                    raise ValueError(
                        f"expected {SIZE} x {SIZE} pixels; got {image.size}"
                    )
                images[index] = np.asarray(to_rgb(image))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataMissingError(
                f"cifar100_folder: {files.place(index)} cannot be used: {error}"
            ) from error
        done = index + 1
        if progress is not None and (done % _CHUNK == 0 or done == files.size):
            progress(f"cifar100_folder {label}", done, files.size)
    return Split(images, files.labels)
