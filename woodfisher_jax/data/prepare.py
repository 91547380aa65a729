"""Downloads a data set and prepares it for TFDS, without TensorFlow.

    python -m woodfisher_jax.data.prepare mnist --data_dir=FOLDER

TFDS itself unpacks the downloaded files and encodes the images with TensorFlow. Those
two steps are replaced here; addresses, checksums, record order and file format remain
those of TFDS, which can read the result as its own. Class names are not kept.
"""

import argparse
import gzip
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from woodfisher_jax.data.array_records import (
    PREPARED_HERE,
    DataMissingError,
    data_root,
    open_images,
)
from woodfisher_jax.exit_codes import FAILED, USAGE, exits

Examples = Iterator[tuple[int, dict[str, Any]]]
"""Pairs of a key and the features of one example.

TFDS derives the order of the records from the keys, so they must be its own: the
example's position in the original files.
"""


def prepare(name: str, data_dir: str | None = None) -> Path:
    """Downloads and prepares a data set, unless that has been done already.

    Args:
        name: a member of `PREPARED_HERE`.
        data_dir: where to; see `array_records.data_root`.

    Returns:
        The folder of the prepared data set.

    Raises:
        ConnectionError: the site that has the files cannot be reached.
        DataMissingError: the folder exists and is incomplete.
    """
    root = data_root(data_dir)
    builder = _builder_class(name)(data_dir=root, file_format="array_record")
    if not builder.data_path.exists():
        for address in builder.url_infos:
            _check_reachable(name, address)
        builder.download_and_prepare()
    open_images(name, root)
    return Path(builder.data_path)


def _check_reachable(name: str, address: str) -> None:
    """Fails at once where TFDS would retry, and print, for some minutes."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError:
        pass  # an answer: TFDS reports what is wrong with it
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # TFDS downloads with other certificates
        raise ConnectionError(
            f"{name} cannot be downloaded: no connection to {address} ({reason}). "
            "Check the network, or prepare it on another machine and copy the folder "
            f"{name} to here."
        ) from error


def _builder_class(name: str) -> Any:
    """TFDS's builder of that name, reading and encoding without TensorFlow."""
    import tensorflow_datasets as tfds

    original: Any = tfds.builder_cls(name)

    class Builder(original, skip_registration=True):  # type: ignore[call-arg]
        name = original.name
        url_infos = original.url_infos

        def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
            addresses = {url.rpartition("/")[2]: url for url in self.url_infos}
            return _splits(self.name, dl_manager.download(addresses))

    return Builder


def _splits(name: str, files: dict[str, Path]) -> dict[str, Examples]:
    """Both splits of a data set, from its downloaded files by their own names."""
    if name == "mnist":
        return {"train": _mnist("train", files), "test": _mnist("t10k", files)}
    (archive,) = files.values()
    if name == "cifar10":
        folder, labels = "cifar-10-batches-bin", ["label"]
        train, test = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
    else:
        folder, labels = "cifar-100-binary", ["coarse_label", "label"]
        train, test = ["train"], ["test"]
    return {
        "train": _cifar("train", archive, [f"{folder}/{m}.bin" for m in train], labels),
        "test": _cifar("test", archive, [f"{folder}/{m}.bin" for m in test], labels),
    }


def _mnist(prefix: str, files: dict[str, Path]) -> Examples:
    """Reads two gzipped idx files; a header of 16 or 8 bytes, then values."""
    with gzip.open(files[f"{prefix}-images-idx3-ubyte.gz"]) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16)
    with gzip.open(files[f"{prefix}-labels-idx1-ubyte.gz"]) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for key, image in enumerate(images.reshape(len(labels), 28, 28)):
        yield key, {"image": _pillow(image), "label": int(labels[key])}


def _cifar(
    split: str, archive: Path, members: list[str], labels: list[str]
) -> Examples:
    """Reads binary files of an archive; a record is its labels, then 3 x 32 x 32.

    Args:
        split: begins the id of an example.
        archive: the tar file.
        members: the files in it, in order.
        labels: what TFDS calls the labels that a record begins with, a byte each.
    """
    content = b""
    with tarfile.open(archive) as tar:
        for member in members:
            file = tar.extractfile(member)
            assert file is not None, f"{member} is not a plain file"
            content += file.read()
    start = len(labels)
    records = np.frombuffer(content, np.uint8).reshape(-1, start + 3 * 32 * 32)
    for key, record in enumerate(records):
        image = record[start:].reshape(3, 32, 32).transpose(1, 2, 0)
        numbers = {label: int(record[i]) for i, label in enumerate(labels)}
        yield key, {"id": f"{split}_{key:05d}", "image": _pillow(image), **numbers}


def _pillow(image: np.ndarray) -> Any:
    """The image as Pillow's, which TFDS encodes as PNG without TensorFlow."""
    from PIL import Image

    return Image.fromarray(image)


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
    parser.add_argument("name", choices=PREPARED_HERE)
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
