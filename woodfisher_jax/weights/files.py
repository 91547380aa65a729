"""Names of files to write, and the safetensors format."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from woodfisher_jax.written_files import replace_file


def check_output(
    path: str | os.PathLike[str],
    *,
    suffix: str = ".safetensors",
    overwrite: bool = False,
) -> Path:
    """Returns the path, if a file of that name may be written.

    Raises:
        ValueError: If the suffix is another.
        FileExistsError: If there is such a file, and ``overwrite`` is False.
        FileNotFoundError: If its folder is missing.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(
            f"out={path}: expected a name that ends in {suffix}, got "
            f"{path.suffix or 'no suffix'}"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out={path}: there is such a file; choose another name or --overwrite"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"out={path}: there is no folder {path.parent}; make it first"
        )
    return path


def save_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes arrays in C order, and strings, to a ``.safetensors`` file."""
    import safetensors.numpy

    # Not save_file: its files are for the owner alone, whatever the umask.
    written = safetensors.numpy.save(dict(arrays), dict(metadata))
    # It writes the strings in an order that differs from one process to the next.
    start = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(written[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # The format aligns what follows.
    length = len(text).to_bytes(8, "little")
    replace_file(path, length, text, memoryview(written)[start:])


def load_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata of a ``.safetensors`` file.

    Raises:
        ValueError: If the file is damaged or of another format.
    """
    import safetensors.numpy

    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        return safetensors.numpy.load_file(path), metadata
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
