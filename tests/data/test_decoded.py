"""What was decoded once is taken from the user's cache while its files are the same."""

import os
from pathlib import Path

import numpy as np
import pytest

from woodfisher_jax.data import decoded
from woodfisher_jax.data.array_records import RecordImages
from woodfisher_jax.data.dataset import Split


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "woodfisher_jax" / "decoded"


@pytest.fixture
def source(tmp_path: Path) -> RecordImages:
    shards = [tmp_path / name for name in ("a", "b")]
    for shard in shards:
        shard.write_bytes(b"1234")
    return RecordImages("mnist test", None, 3, tuple(map(str, shards)))


def decoding(value: int):
    """Decodes to images of one value, and counts how often it does."""
    calls = []

    def decode() -> Split:
        calls.append(value)
        images = np.full((3, 2, 2, 1), value, np.uint8)
        return Split(images, np.arange(3, dtype=np.int32))

    return decode, calls


def test_what_is_kept_is_what_was_decoded(cache: Path, source: RecordImages) -> None:
    decode, calls = decoding(7)
    first, second = (decoded.kept(source, decode) for _ in range(2))
    assert len(calls) == 1
    for mine, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype
    second.images[:] = 0  # not a map of the file
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    train = source._replace(name="mnist train")
    assert decoded.kept(train, decoding(8)[0]).images.max() == 8
    assert decoded.kept(source, decode).images.max() == 7


@pytest.mark.parametrize("change", ["size", "time", "path"])
def test_other_files_are_decoded(cache: Path, source: RecordImages, change) -> None:
    decoded.kept(source, decoding(7)[0])
    shard = Path(source.files[1])
    if change == "size":
        times = shard.stat()
        shard.write_bytes(b"12345")
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "time":
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1000))
    else:
        moved = shard.rename(shard.with_name("c"))
        source = source._replace(files=(source.files[0], str(moved)))
    for _ in range(2):
        assert decoded.kept(source, decoding(8)[0]).images.max() == 8
    decode, calls = decoding(9)
    assert decoded.kept(source, decode).images.max() == 8
    assert not calls


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_cache_is_written_again(
    cache: Path, source: RecordImages, share: float
) -> None:
    decoded.kept(source, decoding(7)[0])
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert decoded.kept(source, decoding(8)[0]).images.max() == 8
    path.write_bytes(path.read_bytes().replace(bytes([8] * 12), bytes([9] * 12)))
    assert decoded.kept(source, decoding(8)[0]).images.max() == 8


def test_a_cache_that_cannot_be_written_is_no_error(
    cache: Path, source: RecordImages
) -> None:
    cache.parents[1].write_bytes(b"a file where the folder would be")
    for value in (7, 8):
        assert decoded.kept(source, decoding(value)[0]).images.max() == value
