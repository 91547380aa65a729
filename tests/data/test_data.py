"""The table of data sets, and those in memory themselves."""

import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import sklearn.model_selection

from woodfisher_jax import data
from woodfisher_jax.data import digits

MNIST_TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def check_form(dataset, train_shape, test_shape):
    for split, shape in ((dataset.train, train_shape), (dataset.test, test_shape)):
        assert split.images.shape == shape
        assert split.images.dtype == np.uint8
        assert split.images.max() == dataset.scale
        assert split.labels.shape == shape[:1]
        assert split.labels.dtype == np.int32
    assert len(dataset.mean) == len(dataset.std) == train_shape[-1]


def test_import_is_light():
    code = (
        "import sys, woodfisher_jax.data; heavy = {'tensorflow_datasets', 'sklearn',"
        "'grain', 'PIL', 'requests'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_lists_the_data_sets_and_guesses():
    with pytest.raises(ValueError, match=r"digits, mnist, cifar10.*mean 'cifar10'"):
        data.load("CIFAR-10")
    with pytest.raises(ValueError, match=r"image_folder.*got 'somewhere'$"):
        data.load("somewhere")


def test_autoaugment_is_for_data_sets_in_files():
    with pytest.raises(ValueError, match=r"autoaugment: expected False for digits"):
        data.load("digits", options=data.ImageOptions(autoaugment=True))


def test_what_a_data_set_says_of_itself():
    dataset = data.load("digits")
    assert (dataset.num_train, dataset.num_test) == (1437, 360)
    assert dataset.image_shape == (8, 8, 1)


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
    train = data.load("digits").train.images / 16
    np.testing.assert_allclose(digits.MEAN, [train.mean()], atol=5e-6)
    np.testing.assert_allclose(digits.STD, [train.std()], atol=5e-6)


def check_order(dataset, tfds_dir):
    """Index i is record i of TFDS, pixel for pixel."""
    import tensorflow_datasets as tfds

    for split in ("train", "test"):
        ours = getattr(dataset, split)
        theirs = tfds.data_source(dataset.name, split=split, data_dir=tfds_dir)
        for index in (0, 1, 4_999, 5_000, 9_999, len(theirs) - 1):
            record = theirs[index]
            np.testing.assert_array_equal(ours.images[index], record["image"])
            assert ours.labels[index] == record["label"]


# One test a data set: under xdist a fixture would be loaded by every worker.


def test_mnist(tfds_dir):
    mnist = data.load("mnist", data_dir=str(tfds_dir))
    check_form(mnist, (60_000, 28, 28, 1), (10_000, 28, 28, 1))
    check_order(mnist, tfds_dir)
    assert np.bincount(mnist.train.labels).tolist() == MNIST_TRAIN_COUNTS
    assert np.bincount(mnist.test.labels).tolist() == MNIST_TEST_COUNTS
    pixels = mnist.train.images / np.float32(mnist.scale)
    np.testing.assert_allclose(pixels.mean(dtype=float), mnist.mean[0], atol=5e-5)
    np.testing.assert_allclose(pixels.std(dtype=float), mnist.std[0], atol=5e-5)
    assert mnist.augment is None


def test_cifar10(tfds_dir):
    cifar10 = data.load("cifar10", data_dir=str(tfds_dir))
    check_form(cifar10, (50_000, 32, 32, 3), (10_000, 32, 32, 3))
    check_order(cifar10, tfds_dir)
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    ends = data.normalize(cifar10, np.array([[0, 0, 255]], np.uint8))
    np.testing.assert_array_equal(ends, [[-1, -1, 1]])
