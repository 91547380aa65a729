"""The data sets by name: what each holds, and the errors when one cannot be read."""

import shutil

import numpy as np
import pytest
import sklearn.datasets
import sklearn.model_selection
import tensorflow_datasets as tfds
from PIL import Image

from woodfisher_jax import data
from woodfisher_jax.data import DataMissingError, generated
from woodfisher_jax.data.augment import crop_and_flip

MNIST_TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

SHAPE = generated.Shape(classes=3, per_class=4, test_per_class=3, side=32)
OPTIONS = data.ImageOptions(image_size=16, resize=20)


def check_form(dataset, train_shape, test_shape):
    for split, shape in ((dataset.train, train_shape), (dataset.test, test_shape)):
        assert split.images.shape == shape
        assert split.images.dtype == np.uint8
        assert split.images.max() == dataset.scale
        assert split.labels.shape == shape[:1]
        assert split.labels.dtype == np.int32
        assert set(split.labels.tolist()) == set(range(dataset.num_classes))
    assert len(dataset.mean) == len(dataset.std) == train_shape[-1]


def test_unknown_name_lists_the_data_sets_and_guesses():
    with pytest.raises(ValueError, match=r"digits, mnist, cifar10.*mean 'cifar10'"):
        data.load("CIFAR-10")
    with pytest.raises(ValueError, match=r"image_folder.*got 'somewhere'$"):
        data.load("somewhere")


# --------------------------------------------------------------------------- in memory


def test_autoaugment_is_for_data_sets_in_files():
    with pytest.raises(ValueError, match=r"autoaugment: expected False for digits"):
        data.load("digits", options=data.ImageOptions(autoaugment=True))


def test_digits_split_is_the_one_of_scikit_learn():
    dataset = data.load("digits")
    check_form(dataset, (1437, 8, 8, 1), (360, 8, 8, 1))
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    train, test, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=0.2, random_state=0
    )
    np.testing.assert_array_equal(dataset.test.images.reshape(-1, 64), test)
    np.testing.assert_array_equal(dataset.test.labels, test_labels)
    # The order of the training examples is ours; the examples are the same.
    ours = np.c_[dataset.train.images.reshape(-1, 64), dataset.train.labels]
    theirs = np.c_[train, train_labels]
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(theirs, axis=0))


def test_digits_constants_are_those_of_the_training_split():
    dataset = data.load("digits")
    pixels = dataset.train.images / 16
    np.testing.assert_allclose(dataset.mean, [pixels.mean()], atol=5e-6)
    np.testing.assert_allclose(dataset.std, [pixels.std()], atol=5e-6)


def check_order(dataset, tfds_dir):
    """Index i is record i of TFDS, pixel for pixel."""
    for split in ("train", "test"):
        ours = getattr(dataset, split)
        theirs = tfds.data_source(dataset.name, split=split, data_dir=tfds_dir)
        for index in (0, 1, 4_999, 5_000, 9_999, len(theirs) - 1):
            record = theirs[index]
            np.testing.assert_array_equal(ours.images[index], record["image"])
            assert ours.labels[index] == record["label"]


@pytest.mark.slow
def test_mnist(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mnist = data.load("mnist", data_dir=str(tfds_dir))
    check_form(mnist, (60_000, 28, 28, 1), (10_000, 28, 28, 1))
    check_order(mnist, tfds_dir)
    assert np.bincount(mnist.train.labels).tolist() == MNIST_TRAIN_COUNTS
    assert np.bincount(mnist.test.labels).tolist() == MNIST_TEST_COUNTS
    pixels = mnist.train.images / np.float32(mnist.scale)
    np.testing.assert_allclose(pixels.mean(dtype=float), mnist.mean[0], atol=5e-5)
    np.testing.assert_allclose(pixels.std(dtype=float), mnist.std[0], atol=5e-5)
    assert mnist.augment is None


@pytest.mark.slow
def test_cifar10(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cifar10 = data.load("cifar10", data_dir=str(tfds_dir))
    check_form(cifar10, (50_000, 32, 32, 3), (10_000, 32, 32, 3))
    check_order(cifar10, tfds_dir)
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    ends = data.normalize(cifar10, np.array([[0, 0, 255]], np.uint8))
    np.testing.assert_array_equal(ends, [[-1, -1, 1]])


@pytest.fixture
def folder(tmp_path):
    """Three classes of two training images and one test image, and their pixels."""
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


def test_cifar100_in_folders(folder):
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


def test_a_file_that_is_no_image_or_of_another_size(folder):
    root, _ = folder
    bad = root / "train" / "c1" / "0.png"
    Image.new("RGB", (32, 31)).save(bad)
    message = rf"{bad} cannot be read: expected 32 x 32 pixels; got \(32, 31\)"
    with pytest.raises(DataMissingError, match=message):
        data.load("cifar100_folder", data_dir=str(root))
    bad.write_bytes(b"")
    message = rf"{bad} cannot be read: cannot identify"
    with pytest.raises(DataMissingError, match=message):
        data.load("cifar100_folder", data_dir=str(root))


# ---------------------------------------------------------------------------- in files


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
        assert (dataset.num_train, dataset.test.size) == (12, 9)
        assert dataset.num_classes == 3
        assert dataset.image_shape == (16, 16, 3)
        (batch,) = data.test_batches(dataset, 9)
        pairs = zip(batch["image"], batch["label"].tolist(), strict=True)
        found.append(sorted((image.tobytes(), label) for image, label in pairs))
    assert found[0] == found[1]
    ends = data.normalize(dataset, np.array([[0, 0, 0], [255, 255, 255]], np.uint8))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(ends, [-mean / std, (1 - mean) / std], rtol=1e-6)


def test_a_folder_without_test_images_is_split(originals, copy):
    assert not load("image_folder", originals).split_off
    shutil.rmtree(copy / "val")
    with pytest.raises(DataMissingError, match=r"there is no folder .*val"):
        load("imagenet_folder", copy)
    dataset = load("image_folder", copy)
    assert (dataset.num_train, dataset.test.size) == (9, 3)
    assert dataset.split_off


def test_images_are_normalised_as_a_checkpoint_expects(originals):
    half = (0.5, 0.5, 0.5)
    options = data.ImageOptions(image_size=16, mean=half, std=half)
    assert options.short_side == 18
    dataset = data.load("image_folder", data_dir=str(originals), options=options)
    ends = data.normalize(dataset, np.array([[0, 0, 0], [255, 255, 255]], np.uint8))
    np.testing.assert_allclose(ends, [[-1] * 3, [1] * 3])


def test_a_corrupt_jpeg_in_the_middle_of_an_epoch(copy, caplog):
    files = sorted((copy / "train").rglob("*.JPEG"))
    files[5].write_bytes(files[5].read_bytes()[:200])
    dataset = load("image_folder", copy)
    place = {"seed": 0, "start": 0, "stop": 3, "batch_size": 4}
    batches = data.epoch_batches(dataset, epoch=0, **place)
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.bincount(labels).tolist() == [4, 4, 4]  # the next one is of its class
    assert str(files[5]) in caplog.text
    assert "image_folder train" in caplog.text
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(data.BadImagesError, match="max_bad_images=10") as caught:
        list(data.epoch_batches(dataset, epoch=1, **place))
    assert str(files[0]) in str(caught.value)


@pytest.mark.parametrize("name", [n for n in data.IN_FILES if n.endswith("_folder")])
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
    assert f"Prepare it with: tfds build {folder}" in text
    assert "--config.data.dir" in text
    assert not list(tmp_path.iterdir())


def records_of(root):
    (folder,) = (root / "imagenet2012").iterdir()
    return folder


def failure(root):
    with pytest.raises(DataMissingError) as caught:
        load("imagenet", root)
    text = str(caught.value)
    assert f"imagenet2012 cannot be read from {root / 'imagenet2012'}" in text
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
    shard.rename(shard.with_name("elsewhere"))
    with pytest.raises(DataMissingError, match=f"{shard.name} is missing"):
        load("imagenet", copy)
    shutil.rmtree(newest)
    assert load("imagenet", copy).num_train == 12


@pytest.mark.parametrize("name", data.SETS)
def test_a_stand_in_has_the_shape_of_the_images(name: str) -> None:
    found = data.stand_in(name, 7, data.ImageOptions(image_size=64))
    assert found.num_classes == 7
    expected = {"digits": (8, 8, 1), "mnist": (28, 28, 1)}.get(name, (32, 32, 3))
    assert found.image_shape == ((64, 64, 3) if name in data.IN_FILES else expected)
    assert found.train.images.strides[0] == 0  # no memory for each
