"""Images that were decoded once, kept in the user's cache."""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from woodfisher_jax.data.array_records import RecordImages
from woodfisher_jax.data.dataset import Split
from woodfisher_jax.written_files import check_room, replace_file, user_cache


def kept(source: RecordImages, decode: Callable[[], Split]) -> Split:
    """A split from the user's cache, or decoded and put there.

    What is kept counts while the files of the split have the same paths, sizes and
    times of modification. Where the cache cannot be read or written, the split is
    decoded.

    Args:
        source: the encoded images.
        decode: gives the split.

    Returns:
        The split.
    """
    files = [(path, Path(path).stat()) for path in source.files]
    stamp = json.dumps([(path, s.st_size, s.st_mtime_ns) for path, s in files])
    place = hashlib.sha256(json.dumps(source.files).encode()).hexdigest()[:16]
    name = f"{source.name.replace(' ', '-')}-{place}.npz"
    path = user_cache() / "decoded" / name
    # One that was cut short has no directory, and each array has a checksum.
    unusable = OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile
    with (
        contextlib.suppress(*unusable),
        path.open("rb") as file,
        np.load(file) as found,
    ):
        if str(found["stamp"]) == stamp:
            return Split(found["images"], found["labels"])
    split = decode()
    content = io.BytesIO()
    np.savez(content, stamp=stamp, images=split.images, labels=split.labels)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, content.getbuffer().nbytes)
        replace_file(path, content.getvalue())
    return split
