"""Data sets as TFDS prepares them, in array_record files, read without TensorFlow.

Example i of a split is record i of `tfds.data_source`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PREPARED_HERE = ("mnist", "cifar10", "cifar100")
"""What `woodfisher_jax.data.prepare` downloads and prepares without TensorFlow."""

_CHUNK = 1_000  # records read at a time


class DataMissingError(FileNotFoundError):
    """A data set is absent, incomplete or damaged; the message says what to do."""


def data_root(data_dir: str | None) -> Path:
    """Returns the folder that holds prepared data sets.

    Args:
        data_dir: the folder; None takes the environment variable TFDS_DATA_DIR, and
            without that the default of TFDS, `~/tensorflow_datasets`.

    Returns:
        The folder, whether or not it exists.
    """
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser()


class RecordImages(NamedTuple):
    """Encoded images of one split.

    Attributes:
        name: of the split, for messages.
        records: TFDS's data source with the images not decoded; random access.
        size: number of images.
        files: their paths.
    """

    name: str
    records: Any
    size: int
    files: tuple[str, ...]

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the content of an image file, and its label."""
        record = self.records[index]
        return record["image"], int(record["label"])

    def read_all(self) -> Iterator[tuple[bytes, int]]:
        """Yields all in order, in chunks, which takes half the time of `read`."""
        for start in range(0, self.size, _CHUNK):
            chunk = range(start, min(start + _CHUNK, self.size))
            for record in self.records.__getitems__(chunk):
                yield record["image"], int(record["label"])

    def place(self, index: int) -> str:
        """Returns which record an image is."""
        return f"{self.name} record {index}"


def open_images(name: str, root: Path) -> tuple[RecordImages, RecordImages, int]:
    """Opens a prepared data set of images with labels, to be read record by record.

    Of several versions in the folder it is the newest.

    Args:
        name: the folder of the data set in `root`, such as "imagenet2012".
        root: the folder that holds prepared data sets.

    Returns:
        The training images; those of the split "validation", or "test" where there is
        none; and the number of classes.

    Raises:
        DataMissingError: nothing was prepared there, a file is missing or cut short, or
            the examples are not images with labels.
    """
    import tensorflow_datasets as tfds

    found = max((root / name).glob("*/dataset_info.json"), default=None, key=_version)
    if found is None:
        reason = f"there is no {root / name}/<version>/dataset_info.json"
        raise unusable(name, root, reason)
    try:
        # From the folder: TFDS then needs no code of the data set, and downloads
        # nothing.
        builder = tfds.builder_from_directory(found.parent, file_format="array_record")
        held_out = "validation" if "validation" in builder.info.splits else "test"
        train, test = (_open_split(builder, split) for split in ("train", held_out))
        return train, test, builder.info.features["label"].num_classes
    # TFDS, array_record and protobuf have no common class for what is wrong with files.
    except Exception as error:
        raise unusable(name, root, str(error)) from error


def _version(info: Path) -> tuple[int, ...]:
    """The version that names the folder of a file, to sort by."""
    parts = info.parent.name.split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)


def _open_split(builder: Any, split: str) -> RecordImages:
    """Opens a split; checks that its files exist and have their ends."""
    from tensorflow_datasets import decode

    info = builder.info.splits[split]
    for path in info.filepaths:
        if not path.exists():
            raise ValueError(f"{path.name} is missing")
    records = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
    start = 0
    for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
        try:
            # A file that was cut short has lost its index, and nothing can be read.
            for index in {start, start + length - 1} if length else ():
                records[index]
        except Exception as error:
            raise ValueError(f"{path.name} is cut short or damaged: {error}") from error
        start += length
    files = tuple(str(path) for path in info.filepaths)
    return RecordImages(f"{builder.name} {split}", records, len(records), files)


def unusable(name: str, root: Path, reason: str) -> DataMissingError:
    """The error for a data set that is absent or damaged.

    Args:
        name: the folder of the data set in `root`.
        root: the folder that holds prepared data sets.
        reason: what is wrong with it.
    """
    if name in PREPARED_HERE:
        command = f"python -m woodfisher_jax.data.prepare {name} --data_dir={root}"
    else:
        command = (
            f"tfds build {name} --file_format=array_record --data_dir={root} "
            f"(ImageNet's two archives first have to be put in {root}/downloads/manual"
            "); image files in folders are read as they are, see docs/data.md"
        )
    # TFDS leaves a folder that exists as it is.
    again = "Delete that folder and prepare it again" if (root / name).exists() else ""
    return DataMissingError(
        f"{name} cannot be read from {root / name}: {reason.rstrip('.')}. "
        f"{again or 'Prepare it'} with: {command}\nIf it lies elsewhere, name the "
        "folder that holds it with --config.data.dir or the environment variable "
        "TFDS_DATA_DIR."
    )
