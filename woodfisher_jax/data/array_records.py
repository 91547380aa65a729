"""Reads TFDS data sets, prepared as array_record files: into memory, or as they lie.

TensorFlow is not needed. Example i of a split is record i of `tfds.data_source`.
"""

import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.data.dataset import Progress, Split

_CHUNK = 5_000  # records between two calls of progress; about half a second
_ELSEWHERE = (
    "If it lies elsewhere, name the folder that holds it with --config.data.dir or "
    "the environment variable TFDS_DATA_DIR."
)
_PREPARE_IMAGES = (
    "TFDS prepares it with: tfds build NAME --file_format=array_record "
    "--data_dir=FOLDER (ImageNet's two archives first have to be put in "
    "FOLDER/downloads/manual); image files in folders are read as they are, see "
    "docs/data.md"
)


class DataMissingError(FileNotFoundError):
    """A data set is absent, incomplete or damaged; the text says what to do."""


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
        records: what TFDS reads them by, without decoding; random access.
        size: number of images.
    """

    name: str
    records: Any
    size: int

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the content of an image file, and its label."""
        record = self.records[index]
        return record["image"], int(record["label"])

    def place(self, index: int) -> str:
        """Returns which record an image is."""
        return f"{self.name} record {index}"


def open_images(name: str, root: Path) -> tuple[RecordImages, RecordImages, int]:
    """Opens a prepared data set of images with labels, to be read record by record.

    The version in the folder is taken, whatever it is, so that TFDS needs no code for
    it.

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
    from google.protobuf.json_format import ParseError

    versions = sorted((root / name).glob("*/dataset_info.json"), key=_version)
    if not versions:
        raise DataMissingError(
            f"{name} is not prepared: there is no {root / name}/<version>/"
            f"dataset_info.json. {_PREPARE_IMAGES}\n{_ELSEWHERE}"
        )
    folder = versions[-1].parent
    try:
        builder = tfds.builder_from_directory(folder, file_format="array_record")
        splits = builder.info.splits
        num_classes = builder.info.features["label"].num_classes
        held_out = "validation" if "validation" in splits else "test"
        train, test = (_open_split(builder, s) for s in ("train", held_out))
    # TFDS and array_record have no common class for what is wrong with files.
    except (ParseError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise DataMissingError(
            f"{name} in {folder} cannot be used: {error}. Copy that folder once more, "
            f"or delete it and prepare it again. {_PREPARE_IMAGES}\n{_ELSEWHERE}"
        ) from error
    return train, test, num_classes


def _open_split(builder: Any, split: str) -> RecordImages:
    """A split, once all its files are there and each has its first and last record."""
    from tensorflow_datasets import decode

    info = builder.info.splits[split]
    for path in info.filepaths:
        if not path.exists():
            raise ValueError(f"{path.name} is missing")
    records = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
    stops = np.cumsum(info.shard_lengths)
    for path, stop, length in zip(
        info.filepaths, stops, info.shard_lengths, strict=True
    ):
        try:
            # A file that was cut short has lost its index, and nothing can be read.
            for index in {int(stop - length), int(stop - 1)} if length else ():
                records[index]
        except Exception as error:
            raise ValueError(f"{path.name} is cut short or damaged: {error}") from error
    return RecordImages(f"{builder.name} {split}", records, len(records))


def _version(path: Path) -> tuple[int, ...]:
    """The version in the name of a file's folder, to sort by."""
    parts = path.parent.name.split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)


def read_splits(
    name: str, data_dir: str | None, progress: Progress | None
) -> tuple[Split, Split]:
    """Reads the splits "train" and "test" of a prepared data set.

    Args:
        name: the name of the data set in TFDS, such as "mnist".
        data_dir: see `data_root`.
        progress: called with ("<name> <split>", done, total) while records are read.

    Returns:
        The training and the test split.

    Raises:
        DataMissingError: nothing was prepared there, a file is missing, or one cannot
            be read.
    """
    root = data_root(data_dir)
    builder = open_builder(name, root)
    return (
        _read_split(builder, "train", root, progress),
        _read_split(builder, "test", root, progress),
    )


def open_builder(name: str, root: Path) -> Any:
    """Opens the TFDS builder of a data set, once all its files are seen to exist.

    Args:
        name: the name of the data set in TFDS.
        root: the folder that holds prepared data sets.

    Returns:
        A `tfds.core.DatasetBuilder`.

    Raises:
        DataMissingError: the data set was not prepared there, or a file is missing.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    # `tfds.data_source` would start a download here; a run never does that.
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except (ParseError, ValueError) as error:
        raise _damaged(name, root / name, root, str(error)) from error
    if not builder.data_path.exists():
        raise DataMissingError(
            f"{name} is not prepared: {builder.data_path} does not exist. Prepare it "
            f"with: {prepare_command(name, root)}\n{_ELSEWHERE}"
        )
    if not builder.is_prepared():
        reason = "it has no dataset_info.json"
        raise _damaged(name, builder.data_path, root, reason)
    for split in ("train", "test"):
        for path in builder.info.splits[split].filepaths:
            if not path.exists():
                reason = f"{path.name} is missing"
                raise _damaged(name, builder.data_path, root, reason)
    return builder


def prepare_command(name: str, root: Path) -> str:
    """Returns the command that downloads and prepares a data set in `root`."""
    return f"python -m woodfisher_jax.data.prepare {name} --data_dir={root}"


def _damaged(
    name: str, folder: os.PathLike[str], root: Path, reason: str
) -> DataMissingError:
    """The error for a folder that exists and does not serve."""
    # TFDS leaves a folder that exists as it is, hence "delete".
    return DataMissingError(
        f"{name} in {os.fspath(folder)} cannot be used: {reason}. Delete that folder "
        f"and prepare it again with: {prepare_command(name, root)}\n{_ELSEWHERE}"
    )


def _read_split(
    builder: Any, split: str, root: Path, progress: Progress | None
) -> Split:
    """Reads and decodes one split in record order."""
    from tensorflow_datasets import decode

    # Records are deserialised by TFDS and decoded here: TFDS takes thrice the time.
    # Threads make it slower still, since most of the work holds the interpreter lock.
    records = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
    total = len(records)
    images = np.empty((total, *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(total, np.int32)
    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        try:
            chunk = records.__getitems__(range(start, stop))
            for index, record in enumerate(chunk, start):
                images[index] = _decode(record["image"], images.shape[1:])
                labels[index] = record["label"]
        except (RuntimeError, OSError, ValueError) as error:
            reason = f"cannot read records {start} to {stop - 1} of {split}: {error}"
            raise _damaged(builder.name, builder.data_path, root, reason) from error
        if progress is not None:
            progress(f"{builder.name} {split}", stop, total)
    return Split(images, labels)


def _decode(png: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decodes one PNG to uint8 [h, w, c]; Pillow leaves out a single channel's axis."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image).reshape(shape)
