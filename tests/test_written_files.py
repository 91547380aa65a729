"""A file is the old one or the new one, and a full disk is named."""

import errno
import os
from pathlib import Path

import pytest

from woodfisher_jax.written_files import WriteError, replace_file


def test_strings_and_bytes_are_written_and_folders_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    for content in ("é\n", b"\xc3\xa9\n", bytearray(b"\xc3\xa9\n")):
        replace_file(path, content)
        assert path.read_bytes() == b"\xc3\xa9\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a"
    replace_file(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(
        WriteError, match=rf"{path} .*No space left.* needs 2,000 bytes, and .* free"
    ):
        replace_file(path, 2000 * "x")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
