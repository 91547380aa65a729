"""A file is the old one or the new one, and a full disk is named."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from woodfisher_jax import written_files
from woodfisher_jax.written_files import ROOM, WriteError, check_room, replace_file


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


def test_a_folder_that_takes_no_files_is_not_too_small(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="expected a folder that can be wri") as found:
        replace_file(tmp_path / "file" / "a", "new")
    assert "bytes" not in str(found.value)


def test_a_disk_that_is_nearly_full_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=ROOM + 5_000_000)
    monkeypatch.setattr(written_files.shutil, "disk_usage", lambda _: usage)
    check_room(tmp_path, 5_000_000)
    with pytest.raises(
        WriteError, match=f"{tmp_path} is full: 16 MB .* 15 MB are free"
    ):
        check_room(tmp_path, 6_000_000)
