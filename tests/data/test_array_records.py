"""Prepared data sets: the folder, the records, and the errors of a damaged copy."""

import json
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from woodfisher_jax import data
from woodfisher_jax.data import DataMissingError, array_records

TEST_SHARD = "mnist-test.array_record-00000-of-00001"
TRAIN_SHARD = "mnist-train.array_record-00000-of-00001"


@pytest.fixture
def copy(tfds_dir, tmp_path, monkeypatch):
    """A copy of MNIST that a test may damage: (root, folder of the version)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (original,) = (tfds_dir / "mnist").iterdir()
    folder = tmp_path / "mnist" / original.name
    folder.mkdir(parents=True)
    for path in original.iterdir():
        shutil.copyfile(path, folder / path.name)
    # The test records take the place of the training records, to read less.
    shutil.copyfile(original / TEST_SHARD, folder / TRAIN_SHARD)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["10000"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path, folder


def failure(root):
    """The text of the error, once it is known to say what every such error must."""
    with pytest.raises(DataMissingError) as caught:
        data.load("mnist", data_dir=str(root))
    text = str(caught.value)
    assert str(root / "mnist") in text
    assert f"woodfisher_jax.data.prepare mnist --data_dir={root}" in text
    assert "--config.data.dir" in text
    assert "TFDS_DATA_DIR" in text
    return text


def test_data_root_prefers_argument_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert str(array_records.data_root("/elsewhere")) == "/elsewhere"
    assert array_records.data_root(None) == tmp_path
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(array_records.data_root(None)) == "/home/me/tensorflow_datasets"
    assert str(array_records.data_root("~/sets")) == "/home/me/sets"


def test_intact_copy_is_read_in_the_order_of_tfds_with_progress(copy):
    calls = []
    mnist = data.load(
        "mnist", data_dir=str(copy[0]), progress=lambda *call: calls.append(call)
    )
    train, test = mnist.train, mnist.test
    assert mnist.num_classes == 10
    assert train.images.shape == (10_000, 28, 28, 1)
    np.testing.assert_array_equal(train.images, test.images)
    theirs = tfds.data_source("mnist", split="test", data_dir=copy[0])
    for index in (0, 4_999, 5_000, 9_999):
        np.testing.assert_array_equal(test.images[index], theirs[index]["image"])
        assert test.labels[index] == theirs[index]["label"]
    assert calls == [
        ("mnist train", 5_000, 10_000),
        ("mnist train", 10_000, 10_000),
        ("mnist test", 5_000, 10_000),
        ("mnist test", 10_000, 10_000),
    ]
    # Again from the cache.
    other = data.load("mnist", data_dir=str(copy[0]))
    np.testing.assert_array_equal(other.test.images, test.images)
    np.testing.assert_array_equal(other.train.labels, train.labels)


def test_nothing_there(tmp_path):
    text = failure(tmp_path)
    assert f"there is no {tmp_path / 'mnist'}/<version>/dataset_info.json" in text
    assert "Delete" not in text
    assert not list(tmp_path.iterdir())  # in particular, no download has begun


def test_no_dataset_info(copy):
    root, folder = copy
    (folder / "dataset_info.json").unlink()
    text = failure(root)
    assert "dataset_info.json" in text
    assert "Delete that folder" in text


def test_truncated_dataset_info(copy):
    root, folder = copy
    info = folder / "dataset_info.json"
    info.write_text(info.read_text()[:300])
    assert "Failed to load JSON" in failure(root)


def test_prepared_in_another_format(copy):
    root, folder = copy
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    text = failure(root)
    assert "array_record does not match" in text
    assert "tfrecord" in text


def test_missing_shard(copy):
    root, folder = copy
    (folder / TEST_SHARD).unlink()
    assert f"{TEST_SHARD} is missing" in failure(root)


@pytest.mark.parametrize("kept", [0, 100, 500_000, -65_536])
def test_truncated_shard(copy, kept):
    root, folder = copy
    shard = folder / TRAIN_SHARD
    shard.write_bytes(shard.read_bytes()[:kept])
    assert f"{TRAIN_SHARD} is cut short or damaged" in failure(root)


def test_overwritten_bytes(copy):
    root, folder = copy
    content = bytearray((folder / TRAIN_SHARD).read_bytes())
    content[1_000_000:1_000_500] = bytes(500)
    (folder / TRAIN_SHARD).write_bytes(content)
    assert re.search(r"mnist train record \d+ cannot be read", failure(root))


def test_shard_with_too_few_records(copy):
    root, folder = copy
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["15000"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert f"{TRAIN_SHARD} is cut short or damaged" in failure(root)
