"""Image files in folders of their classes: train/<class>/*.JPEG, val/<class>/*.JPEG.

The layout that PyTorch's image folders have. The names of the class folders, sorted,
are the labels 0, 1, 2, ..., so that a network trained there has its classes in order
here.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from woodfisher_jax.data.array_records import DataMissingError

SUFFIXES = (".jpeg", ".jpg", ".png")
"""What image files end in, in upper or lower case."""

EVALUATION = ("val", "validation", "test")
"""Names that the folder with evaluation images may have; the first there is taken."""


class ImageFiles(NamedTuple):
    """The files of one split, by class and then by name.

    Attributes:
        folder: the folder that the class folders are in.
        classes: names of the class folders, sorted.
        paths: path of each file in `folder`, bytes [n]: an array of these is small
            and quick to hand to another process, where a list of a million is not.
        labels: int32 [n].
    """

    folder: Path
    classes: tuple[str, ...]
    paths: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the content of a file, and its label."""
        return Path(self.place(index)).read_bytes(), int(self.labels[index])

    def place(self, index: int) -> str:
        """Returns where a file is."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.paths[index])))


def find_images(name: str, root: Path) -> tuple[ImageFiles, ImageFiles]:
    """Lists the image files of both splits.

    Args:
        name: the data set, for error messages.
        root: the folder that has the folders train and val.

    Returns:
        The training and the evaluation images.

    Raises:
        DataMissingError: a folder is missing or has no images, or the two splits
            differ in their classes.
    """
    held_out = next((e for e in EVALUATION if (root / e).is_dir()), EVALUATION[0])
    splits = []
    for split in ("train", held_out):
        if not (root / split).is_dir():
            raise _incomplete(name, root, f"there is no folder {root / split}")
        splits.append(_list_split(name, root, root / split))
    train, test = splits
    only = sorted(set(train.classes) ^ set(test.classes))
    if only:
        raise _incomplete(
            name,
            root,
            f"train has {len(train.classes)} classes and {held_out} "
            f"{len(test.classes)}; in one of them only: {_few(only)}",
        )
    return train, test


def _list_split(name: str, root: Path, folder: Path) -> ImageFiles:
    """All images below the class folders of one split."""
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    paths: list[bytes] = []
    counts, empty = [], []
    for class_name in classes:
        found = sorted(
            os.path.join(os.path.relpath(place, folder), file)
            for place, _, files in os.walk(folder / class_name, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES)
        )
        if not found:
            empty.append(class_name)
        counts.append(len(found))
        paths += map(os.fsencode, found)
    if not classes:
        raise _incomplete(name, root, f"{folder} has no class folders")
    if empty:
        reason = f"{folder} has class folders without images: {_few(empty)}"
        raise _incomplete(name, root, reason)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageFiles(folder, tuple(classes), np.array(paths), labels)


def _few(names: list[str]) -> str:
    """The first names, and how many there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _incomplete(name: str, root: Path, reason: str) -> DataMissingError:
    return DataMissingError(
        f"{name} in {root} cannot be used: {reason}. Expected image files "
        f"({', '.join(SUFFIXES)}) as train/<class>/... and val/<class>/..., with the "
        "same classes in both; unpack what is missing, or name another folder with "
        "--config.data.dir"
    )
