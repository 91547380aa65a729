"""Data sets of photographs, read from their files: ImageNet, Imagenette, any folder."""

from collections.abc import Callable
from pathlib import Path

from woodfisher_jax.data.array_records import DataMissingError, data_root, open_images
from woodfisher_jax.data.dataset import DataSet
from woodfisher_jax.data.generated import write_once
from woodfisher_jax.data.image_folder import find_images
from woodfisher_jax.data.streams import ImageOptions, ImageSource, ImageStream

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's channels, on a scale from 0 to 1; pretrained networks expect them."""


def imagenet(data_dir: str | None, options: ImageOptions) -> DataSet:
    """ILSVRC 2012 as TFDS prepared it: `imagenet2012`, in array_record files.

    Args:
        data_dir: the folder with prepared data sets; see `array_records.data_root`.
        options: how images are read.

    Returns:
        The data set: 1,281,167 training images, 50,000 to evaluate on; classes in the
        order of PyTorch's ImageNet.

    Raises:
        DataMissingError: the data is absent, incomplete or damaged.
    """
    return _from_records("imagenet", "imagenet2012", data_dir, options)


def imagenette(data_dir: str | None, options: ImageOptions) -> DataSet:
    """Ten classes of ImageNet as TFDS prepared them: `imagenette/full-size-v2`.

    Args:
        data_dir: the folder with prepared data sets; see `array_records.data_root`.
        options: how images are read.

    Returns:
        The data set: 9,469 training images, 3,925 to evaluate on.

    Raises:
        DataMissingError: the data is absent, incomplete or damaged.
    """
    return _from_records("imagenette", "imagenette/full-size-v2", data_dir, options)


def image_folder(name: str) -> Callable[[str | None, ImageOptions], DataSet]:
    """Returns the loader of image files in folders of their classes.

    Args:
        name: what the data set is called.
    """

    def load(data_dir: str | None, options: ImageOptions) -> DataSet:
        """Lists the files below `data_dir`/train and `data_dir`/val."""
        if data_dir is None:
            raise DataMissingError(
                f"{name}: expected the folder that holds train/<class>/ and "
                "val/<class>/; name it with --config.data.dir"
            )
        root = Path(data_dir).expanduser()
        train, test = find_images(name, root)
        return _data_set(name, train, test, len(train.classes), options)

    return load


def generated_images(data_dir: str | None, options: ImageOptions) -> DataSet:
    """A small set of ten classes, drawn by a program, as JPEG files in folders.

    Args:
        data_dir: where it is, or is written the first time; None for the user's cache.
        options: how images are read.

    Returns:
        The data set.
    """
    root = write_once("images", data_dir)
    train, test = find_images("generated_images", root)
    return _data_set("generated_images", train, test, len(train.classes), options)


def generated_records(data_dir: str | None, options: ImageOptions) -> DataSet:
    """The same as `generated_images`, in the files of TFDS.

    Args:
        data_dir: where it is, or is written the first time; None for the user's cache.
        options: how images are read.

    Returns:
        The data set.
    """
    root = write_once("records", data_dir)
    return _from_records("generated_records", "imagenet2012", str(root), options)


def _from_records(
    name: str, tfds_name: str, data_dir: str | None, options: ImageOptions
) -> DataSet:
    train, test, num_classes = open_images(tfds_name, data_root(data_dir))
    return _data_set(name, train, test, num_classes, options)


def _data_set(
    name: str,
    train: ImageSource,
    test: ImageSource,
    num_classes: int,
    options: ImageOptions,
) -> DataSet:
    return DataSet(
        name=name,
        train=ImageStream(f"{name} train", train, options),
        test=ImageStream(f"{name} test", test, options),
        num_classes=num_classes,
        scale=255.0,
        mean=MEAN,
        std=STD,
        augment=None,
    )


STREAMED: dict[str, Callable[[str | None, ImageOptions], DataSet]] = {
    "imagenet": imagenet,
    "imagenet_folder": image_folder("imagenet_folder"),
    "imagenette": imagenette,
    "imagenette_folder": image_folder("imagenette_folder"),
    "image_folder": image_folder("image_folder"),
    "generated_images": generated_images,
    "generated_records": generated_records,
}
"""Name of a data set in files to the function (data_dir, options) that opens it."""
