"""Data sets in files by name: both forms alike, and what is said when one is amiss."""

import shutil

import numpy as np
import pytest

from woodfisher_jax import data
from woodfisher_jax.data import DataMissingError, generated, imagenet

SHAPE = generated.Shape(classes=3, per_class=4, test_per_class=3, side=32)
OPTIONS = data.ImageOptions(image_size=16, resize=20)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with train/ and val/, and with imagenet2012/ of the same images."""
    root = tmp_path_factory.mktemp("images")
    generated.write_folder(root, SHAPE)
    generated.write_records(root, SHAPE)
    return root


@pytest.fixture
def copy(originals, tmp_path):
    """The same, to be damaged."""
    return shutil.copytree(originals, tmp_path / "copy")


def load(name, root):
    return data.load(name, data_dir=str(root), options=OPTIONS)


def test_both_forms_give_the_same_test_images(originals):
    found = []
    for name in ("imagenet", "imagenet_folder"):
        dataset = load(name, originals)
        assert dataset.name == name
        assert (dataset.num_train, dataset.num_test, dataset.num_classes) == (12, 9, 3)
        assert dataset.image_shape == (16, 16, 3)
        (batch,) = data.test_batches(dataset, 9)
        pairs = zip(batch["image"], batch["label"].tolist(), strict=True)
        found.append(sorted((image.tobytes(), label) for image, label in pairs))
    assert found[0] == found[1]


def test_pixels_are_normalised_with_the_constants_of_imagenet():
    dataset = imagenet._data_set("mine", None, None, 10, OPTIONS)
    ends = data.normalize(dataset, np.array([[0, 0, 0], [255, 255, 255]], np.uint8))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(ends, [-mean / std, (1 - mean) / std], rtol=1e-6)


def test_a_corrupt_jpeg_in_the_middle_of_an_epoch(copy, caplog):
    files = sorted((copy / "train").rglob("*.JPEG"))
    files[5].write_bytes(files[5].read_bytes()[:200])
    dataset = load("image_folder", copy)
    batches = data.epoch_batches(
        dataset, seed=0, epoch=0, start=0, stop=3, batch_size=4
    )
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.bincount(labels).tolist() == [4, 4, 4]  # the next one is of its class
    assert str(files[5]) in caplog.text
    assert "image_folder train" in caplog.text
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(data.BadImagesError, match="max_bad_images=10") as caught:
        list(
            data.epoch_batches(dataset, seed=0, epoch=1, start=0, stop=3, batch_size=4)
        )
    assert str(files[0]) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["image_folder", "imagenet_folder", "imagenette_folder"]
)
def test_a_folder_has_to_be_named(name):
    with pytest.raises(DataMissingError, match=rf"{name}: .* --config.data.dir"):
        data.load(name)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("imagenet", "imagenet2012"), ("imagenette", "imagenette/full-size-v2")],
)
def test_nothing_was_prepared(name, folder, tmp_path):
    with pytest.raises(DataMissingError) as caught:
        load(name, tmp_path)
    text = str(caught.value)
    assert f"there is no {tmp_path / folder}/<version>/dataset_info.json" in text
    assert "tfds build" in text
    assert "--config.data.dir" in text
    assert not list(tmp_path.iterdir())


def records_of(root):
    (folder,) = (root / "imagenet2012").iterdir()
    return folder


def failure(root):
    with pytest.raises(DataMissingError) as caught:
        load("imagenet", root)
    text = str(caught.value)
    assert f"imagenet2012 in {records_of(root)} cannot be used" in text
    assert "prepare it again" in text
    return text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_shard_is_missing(copy, split):
    (shard,) = records_of(copy).glob(f"*-{split}.array_record*")
    shard.unlink()
    assert f"{shard.name} is missing" in failure(copy)


@pytest.mark.parametrize("kept", [0, 100, 5_000, -10])
def test_a_shard_is_cut_short(copy, kept):
    (shard,) = records_of(copy).glob("*-train.array_record*")
    shard.write_bytes(shard.read_bytes()[:kept])
    assert f"{shard.name} is cut short or damaged" in failure(copy)


def test_the_description_is_damaged(copy):
    info = records_of(copy) / "dataset_info.json"
    text = info.read_text()
    info.write_text(text[: len(text) // 2])
    failure(copy)
    info.write_text(text)
    (records_of(copy) / "features.json").unlink()
    failure(copy)


def test_the_newest_version_is_taken(copy):
    newest = copy / "imagenet2012" / "10.0.0"
    shutil.copytree(records_of(copy), newest)
    (shard,) = newest.glob("*-train.array_record*")
    shard.unlink()
    with pytest.raises(DataMissingError, match=r"10\.0\.0 cannot be used"):
        load("imagenet", copy)
