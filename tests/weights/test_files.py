"""Files are written whole or not at all."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from woodfisher_jax.weights.files import (
    check_output,
    load_safetensors,
    save_safetensors,
)


def test_arrays_and_metadata_are_restored(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": np.arange(3)}, {"format": "pt"})
    arrays, metadata = load_safetensors(path)
    np.testing.assert_array_equal(arrays["a"], np.arange(3))
    assert metadata == {"format": "pt"}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="deserializing"):
        load_safetensors(path)


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    told = {name: f'"{name}"\n\u2028ü/\\' for name in "dbace"}
    arrays = {"w": np.arange(5.0), "v": np.ones((2, 3), np.float16)}
    save_safetensors(tmp_path / "one.safetensors", arrays, told)
    backwards = dict(reversed(told.items()))
    save_safetensors(tmp_path / "two.safetensors", arrays, backwards)
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    found, strings = load_safetensors(one)
    assert strings == told
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    order = [one.read_bytes().index(f'"{name}":"'.encode()) for name in "abcde"]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("x.pth", ValueError, r"x\.pth: expected a name that ends in \.safetensors"),
        ("x", ValueError, "no suffix"),
        ("none/x.safetensors", FileNotFoundError, "there is no folder"),
        ("there.safetensors", FileExistsError, "there is such a file.*--overwrite"),
    ],
)
def test_names_that_cannot_be_written(
    tmp_path: Path, name: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(error, match=words):
        check_output(tmp_path / name)
    there = tmp_path / "there.safetensors"
    assert check_output(there, overwrite=True) == there


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": np.ones(3)}, {})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(path, {"a": np.zeros(3)}, {})
    assert path.read_bytes() == before


def test_the_umask_decides_who_may_read_a_file(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save_safetensors(tmp_path / "a.safetensors", {"a": np.ones(3)}, {})
    finally:
        os.umask(old)
    mode = (tmp_path / "a.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644
