"""CIFAR-100 from folders; as TFDS prepares it, see test_data_prepare."""

import numpy as np
import pytest
from PIL import Image

from woodfisher_jax import data
from woodfisher_jax.data import DataMissingError
from woodfisher_jax.data.augment import crop_and_flip


@pytest.fixture
def folder(tmp_path):
    """Three classes of two training images and one to test on, and their pixels."""
    rng = np.random.default_rng(0)
    pixels = {}
    for split, count in (("train", 2), ("test", 1)):
        for label in range(3):
            (tmp_path / split / f"c{label}").mkdir(parents=True)
            for number in range(count):
                image = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                pixels[split, label, number] = image
                path = tmp_path / split / f"c{label}" / f"{number}.png"
                Image.fromarray(image).save(path)
    return tmp_path, pixels


def test_a_folder_is_read_into_memory(folder):
    root, pixels = folder
    calls = []
    dataset = data.load(
        "cifar100_folder", data_dir=str(root), progress=lambda *call: calls.append(call)
    )
    assert dataset.num_classes == 3
    assert dataset.augment is crop_and_flip
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [0, 1, 2]
    expected = [pixels["train", label, n] for label in range(3) for n in range(2)]
    np.testing.assert_array_equal(dataset.train.images, expected)
    assert calls == [("cifar100_folder train", 6, 6), ("cifar100_folder test", 3, 3)]


def test_the_folder_has_to_be_named():
    with pytest.raises(DataMissingError, match=r"--config.data.dir"):
        data.load("cifar100_folder")


def test_a_file_that_is_no_image_or_of_another_size(folder):
    root, _ = folder
    bad = root / "train" / "c1" / "0.png"
    Image.new("RGB", (32, 31)).save(bad)
    message = rf"{bad} cannot be used: expected 32 x 32 pixels; got \(32, 31\)"
    with pytest.raises(DataMissingError, match=message):
        data.load("cifar100_folder", data_dir=str(root))
    bad.write_bytes(b"")
    with pytest.raises(
        DataMissingError, match=rf"{bad} cannot be used: cannot identify"
    ):
        data.load("cifar100_folder", data_dir=str(root))
