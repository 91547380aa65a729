"""Downloads a data set and prepares it for TFDS, without TensorFlow.

    python -m woodfisher_jax.data.prepare mnist --data_dir=FOLDER

TFDS itself unpacks the downloaded files and encodes the images with TensorFlow. Those
two steps are replaced here; addresses, checksums, record order and file format remain
those of TFDS, which then reads the result as its own. Class names are not kept.
"""

import argparse
import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from woodfisher_jax.data.array_records import DataMissingError, data_root, open_builder
from woodfisher_jax.exit_codes import FAILED, USAGE, exits

Examples = Iterator[tuple[int, dict[str, Any]]]
"""Pairs of a key and the features of one example.

TFDS derives the order of the records from the keys, so they must be its own: the
example's position in the original files.
"""


def prepare(name: str, data_dir: str | None = None) -> Path:
    """Downloads and prepares a data set, unless that has been done already.

    Args:
        name: a key of `SPLITS`.
        data_dir: where to; see `array_records.data_root`.

    Returns:
        The folder of the prepared data set.

    Raises:
        ConnectionError: the site that has the files cannot be reached.
        DataMissingError: a folder is there already and is incomplete.
    """
    root = data_root(data_dir)
    builder = _builder_class(name)(data_dir=root, file_format="array_record")
    if not builder.data_path.exists():
        for address in builder.url_infos:
            _check_reachable(name, address)
        builder.download_and_prepare()
    return Path(open_builder(name, root).data_path)


def _check_reachable(name: str, address: str) -> None:
    """Fails at once where TFDS would try, and print, for some minutes."""
    import requests

    try:
        requests.head(address, timeout=30)
    except requests.RequestException as error:
        raise ConnectionError(
            f"{name} cannot be downloaded: no connection to {address} "
            f"({type(error).__name__}). Check the network, or prepare it on another "
            f"machine and copy the folder {name} to here."
        ) from error


def _builder_class(name: str) -> Any:
    """TFDS's builder of that name, reading and encoding without TensorFlow."""
    import tensorflow_datasets as tfds

    original: Any = tfds.builder_cls(name)
    read_splits = SPLITS[name]

    class Builder(original, skip_registration=True):  # type: ignore[call-arg]
        name = original.name
        url_infos = original.url_infos

        def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
            addresses = {url.rpartition("/")[2]: url for url in self.url_infos}
            return read_splits(dl_manager.download(addresses))

    return Builder


def _mnist_splits(files: dict[str, Path]) -> dict[str, Examples]:
    """Reads MNIST's four idx files, gzipped; a header of 16 or 8 bytes, then values."""

    def examples(prefix: str) -> Examples:
        with gzip.open(files[f"{prefix}-images-idx3-ubyte.gz"]) as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16)
        with gzip.open(files[f"{prefix}-labels-idx1-ubyte.gz"]) as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        for key, image in enumerate(images.reshape(len(labels), 28, 28)):
            yield key, {"image": _pillow(image), "label": int(labels[key])}

    return {"train": examples("train"), "test": examples("t10k")}


def _cifar_splits(
    archive_name: str, folder: str, train: list[str], test: list[str], labels: list[str]
) -> Callable[[dict[str, Path]], dict[str, Examples]]:
    """Reads a binary archive; a record is its labels and 3 planes of 32 x 32.

    Args:
        archive_name: the file.
        folder: the folder within it.
        train: files of training examples there, in order, without ".bin".
        test: files of test examples.
        labels: what TFDS calls the labels that a record begins with, a byte each.
    """

    def examples(path: Path, split: str, members: list[str]) -> Examples:
        content = b""
        with tarfile.open(path) as archive:
            for member in members:
                file = archive.extractfile(f"{folder}/{member}.bin")
                assert file is not None, f"{member} is not a plain file"
                content += file.read()
        records = np.frombuffer(content, np.uint8).reshape(
            -1, len(labels) + 3 * 32 * 32
        )
        for key, record in enumerate(records):
            image = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield (
                key,
                {
                    "id": f"{split}_{key:05d}",
                    "image": _pillow(image),
                    **{label: int(record[i]) for i, label in enumerate(labels)},
                },
            )

    def splits(files: dict[str, Path]) -> dict[str, Examples]:
        path = files[archive_name]
        return {
            "train": examples(path, "train", train),
            "test": examples(path, "test", test),
        }

    return splits


def _pillow(image: np.ndarray) -> Any:
    """The image as Pillow's, which TFDS encodes as PNG without TensorFlow."""
    from PIL import Image

    return Image.fromarray(image)


SPLITS: dict[str, Callable[[dict[str, Path]], dict[str, Examples]]] = {
    "mnist": _mnist_splits,
    "cifar10": _cifar_splits(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        [f"data_batch_{number}" for number in range(1, 6)],
        ["test_batch"],
        ["label"],
    ),
    "cifar100": _cifar_splits(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        ["train"],
        ["test"],
        ["coarse_label", "label"],
    ),
}
"""Name of a data set to the function that reads its downloaded files, by file name."""


def main(argv: list[str] | None = None) -> None:
    """The command line: a name, and where to.

    Args:
        argv: the arguments; None takes the command line's.

    Raises:
        SystemExit: when the data set cannot be prepared.
    """
    parser = argparse.ArgumentParser(
        prog="python -m woodfisher_jax.data.prepare",
        description="Downloads a data set and prepares it, without TensorFlow.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python -m woodfisher_jax.data.prepare mnist --data_dir=data
exit codes: 0 done, 1 the download failed, 2 the command has to be changed""",
    )
    parser.add_argument("name", choices=SPLITS)
    parser.add_argument(
        "--data_dir",
        help="folder of prepared data sets (default: the environment variable "
        "TFDS_DATA_DIR, or ~/tensorflow_datasets)",
    )
    options = parser.parse_args(argv)
    with exits({DataMissingError: USAGE, OSError: FAILED}):
        folder = prepare(options.name, options.data_dir)
    print(f"{options.name} is ready in {folder}")


if __name__ == "__main__":
    main()
