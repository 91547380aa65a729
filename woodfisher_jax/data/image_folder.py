"""Image files in folders of their classes: train/<class>/*.JPEG, val/<class>/*.JPEG.

The layout of PyTorch's image folders. The names of the class folders, sorted, are the
labels 0, 1, 2, ..., so the classes of a network trained there have the same order here.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from woodfisher_jax.data.array_records import DataMissingError

SUFFIXES = (
    ".jpeg",
    ".jpg",
    ".png",
    ".bmp",
    ".pgm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
"""What image files end in, in upper or lower case: as for PyTorch's image folders."""

EVALUATION = ("val", "validation", "test")
"""Names that the folder with evaluation images may have; the first there is taken."""

HELD_OUT = 5
"""One of so many images of a class is for evaluation, where no folder is."""


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

    def read_all(self) -> Iterator[tuple[bytes, int]]:
        """Yields all in order."""
        return (self.read(index) for index in range(self.size))

    def place(self, index: int) -> str:
        """Returns the path of a file."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.paths[index])))


def find_images(
    name: str, data_dir: str | Path | None, *, may_split: bool = False
) -> tuple[ImageFiles, ImageFiles]:
    """Lists the image files of both splits.

    Args:
        name: the data set, for error messages.
        data_dir: the folder that has the folders train and val.
        may_split: whether a fifth of each class is held out for evaluation, drawn
            with a seed of its own, where no folder has evaluation images; the class
            folders may then be in `data_dir` itself. Default False.

    Returns:
        The training and the evaluation images; of one `folder` if they were split here.

    Raises:
        DataMissingError: no folder is named, one is missing or has no images, or the
            two splits differ in their classes.
    """
    if data_dir is None:
        raise DataMissingError(
            f"{name}: expected the folder that holds train/<class>/ and val/<class>/; "
            "name it with --config.data.dir"
        )
    root = Path(data_dir).expanduser()
    found = [e for e in EVALUATION if (root / e).is_dir()]
    held_out = found[0] if found else EVALUATION[0]
    try:
        if may_split and not found and root.is_dir():
            has_train = (root / "train").is_dir()
            return _split(_list_split(root / "train" if has_train else root))
        train, test = _list_split(root / "train"), _list_split(root / held_out)
        only = sorted(set(train.classes) ^ set(test.classes))
        if only:
            raise ValueError(
                f"train has {len(train.classes)} classes and {held_out} "
                f"{len(test.classes)}; in one of them only: {_few(only)}"
            )
    except ValueError as error:
        raise DataMissingError(
            f"{name} in {root} cannot be used: {error}. Expected image files "
            f"({', '.join(SUFFIXES)}) as train/<class>/... and val/<class>/..., with "
            "the same classes in both; unpack what is missing, or name another folder "
            "with --config.data.dir"
        ) from error
    return train, test


def _split(files: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
    """Splits a list of images: each class by the same share."""
    counts = np.bincount(files.labels, minlength=len(files.classes))
    single = [files.classes[label] for label in np.flatnonzero(counts == 1)]
    if single:
        raise ValueError(
            f"{files.folder} has class folders with a single image: {_few(single)}; "
            "expected two or more, of which one is held out for evaluation"
        )
    # RandomState: NumPy promises its stream for ever, and not that of default_rng.
    rng = np.random.RandomState(0)
    is_held_out = np.zeros(files.size, bool)
    for label, count in enumerate(counts):
        drawn = rng.permutation(count)[: max(1, count // HELD_OUT)]
        is_held_out[np.flatnonzero(files.labels == label)[drawn]] = True
    train, test = (
        files._replace(paths=files.paths[chosen], labels=files.labels[chosen])
        for chosen in (~is_held_out, is_held_out)
    )
    return train, test


def _list_split(folder: Path) -> ImageFiles:
    """Lists all images below the class folders of one split."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    with os.scandir(folder) as entries:
        classes = sorted(
            entry.name
            for entry in entries
            # Folders of tools, such as .ipynb_checkpoints, are no classes.
            if entry.is_dir() and not entry.name.startswith(".")
        )
    if not classes:
        raise ValueError(f"{folder} has no class folders")
    found = [
        sorted(
            os.path.join(os.path.relpath(place, folder), file)
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES)
        )
        for name in classes
    ]
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        raise ValueError(f"{folder} has class folders without images: {_few(empty)}")
    counts = [len(files) for files in found]
    return ImageFiles(
        folder,
        tuple(classes),
        np.array([os.fsencode(file) for files in found for file in files]),
        np.repeat(np.arange(len(classes), dtype=np.int32), counts),
    )


def _few(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
