"""A small data set like ImageNet, drawn by a program: real JPEG files, easy to learn.

A class is a colour with stripes of a direction and a width of its own; their position,
the brightness of the image, its noise and its size are random.
"""

import colorsys
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.written_files import WriteError, user_cache

_VERSION = "1"  # of the files that `write_once` keeps; to change with what is drawn


class Shape(NamedTuple):
    """How large a generated set is.

    Attributes:
        classes: number of classes.
        per_class: training images of each class.
        test_per_class: images of each class to evaluate on.
        side: mean width and height in pixels; single images have 3/4 to 5/4 of it.
    """

    classes: int = 10
    per_class: int = 32
    test_per_class: int = 10
    side: int = 96


SMALL = Shape()
"""What `write_once` writes: 320 training images and 100 others, 2 MB."""


def write_folder(root: Path, shape: Shape = SMALL, seed: int = 0) -> None:
    """Writes train/<class>/*.JPEG and val/<class>/*.JPEG into a folder.

    Args:
        root: the folder; made if it does not exist.
        shape: how many images, and of which size.
        seed: zero or above.
    """
    for split in ("train", "val"):
        for name, label, content in _images(split, shape, seed):
            folder = root / split / _class_name(label)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def write_records(root: Path, shape: Shape = SMALL, seed: int = 0) -> None:
    """Writes the images of `write_folder` as TFDS prepares imagenet2012.

    The arguments are those of `write_folder`; `root` is a folder of prepared data sets.
    """
    import tensorflow_datasets as tfds

    base: Any = tfds.core.GeneratorBasedBuilder

    def records(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, label, content in _images(split, shape, seed):
            image = io.BytesIO(content)
            yield name, {"file_name": name, "image": image, "label": label}

    class Builder(base, skip_registration=True):  # type: ignore[call-arg]
        name = "imagenet2012"
        VERSION = tfds.core.Version("5.1.0")

        def _info(self) -> Any:
            names = [_class_name(label) for label in range(shape.classes)]
            features = {
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=names),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Generated images, laid out as imagenet2012.",
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": records("train"), "validation": records("val")}

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in TFDS; the splits bring their own

    builder = Builder(data_dir=root, file_format="array_record")
    tfds.disable_progress_bar()
    try:
        # Nothing is downloaded, but TFDS makes a folder for it.
        with (
            tempfile.TemporaryDirectory() as downloads,
            contextlib.redirect_stdout(None),
        ):
            builder.download_and_prepare(download_dir=downloads)
    finally:
        tfds.enable_progress_bar()


FORMS = {"images": write_folder, "records": write_records}
"""Name of a form to the function of (folder) that writes it."""


def write_once(form: str, data_dir: str | None) -> Path:
    """Returns the folder of a generated set, which the first call writes.

    Several processes may call it at the same time: each writes a copy, and one stays.

    Args:
        form: a key of `FORMS`.
        data_dir: the folder to keep it in; None takes the environment variable
            XDG_CACHE_HOME, and without that `~/.cache`.

    Returns:
        The folder, complete.

    Raises:
        WriteError: If it cannot be written.
    """
    parent = Path(data_dir).expanduser() if data_dir else user_cache()
    root = parent / f"generated_{form}-{_VERSION}"
    if root.exists():
        return root
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".generated-") as scratch:
            written = Path(scratch) / form
            FORMS[form](written)
            try:
                written.rename(root)
            except OSError:
                if not root.exists():  # else another process was sooner
                    raise
    except OSError as error:
        raise WriteError(
            f"data_dir={data_dir}: {root} cannot be written ({error.strerror or error})"
            "; expected a folder that can be written to"
        ) from error
    return root


def draw(label: int, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Draws one image of a class.

    Args:
        label: the class.
        shape: of the set.
        rng: where size, position, brightness and noise come from.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = rng.integers(3 * shape.side // 4, 5 * shape.side // 4 + 1, size=2)
    share = label / shape.classes
    colour = 200.0 * np.array(colorsys.hsv_to_rgb(share, 0.7, 1.0))
    # A quarter turn at most: mirrored stripes still differ from those of other classes.
    angle, waves = np.pi / 2 * share, 4 + 3 * (label % 3)
    down, across = np.mgrid[:height, :width] / shape.side
    distance = np.cos(angle) * across + np.sin(angle) * down
    phase = 2 * np.pi * (waves * distance + rng.random())
    light = (1 + 0.3 * np.sin(phase)) * rng.uniform(0.6, 1.0)
    pixels = light[:, :, None] * colour + rng.normal(0, 12, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _images(split: str, shape: Shape, seed: int) -> Iterator[tuple[str, int, bytes]]:
    """File name, label and JPEG of each image of a split."""
    from PIL import Image

    stream, count = (0, shape.per_class)
    if split == "val":
        stream, count = (1, shape.test_per_class)
    for label in range(shape.classes):
        for number in range(count):
            seeds = np.random.SeedSequence(seed, spawn_key=(stream, label, number))
            pixels = draw(label, shape, np.random.default_rng(seeds))
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            yield f"{_class_name(label)}_{number:05d}.JPEG", label, file.getvalue()


def _class_name(label: int) -> str:
    """A name of the form that ImageNet's classes have."""
    return f"n{label:08d}"
