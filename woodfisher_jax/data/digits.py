"""Digits: 1,797 images of 8 x 8 pixels that come with scikit-learn; no download."""

import numpy as np

from woodfisher_jax.data.dataset import DataSet, Progress, Split

NUM_TEST = 360
MEAN = (0.30559,)  # of pixel / 16 over the training split
STD = (0.37630,)


def load(data_dir: str | None = None, progress: Progress | None = None) -> DataSet:
    """Loads digits in a fixed split of 1,437 training and 360 test images.

    Args:
        data_dir: not used; the images are part of scikit-learn.
        progress: not used; it takes no time.

    Returns:
        The data set: images uint8 [n, 8, 8, 1] of 0 to 16, ten classes.

    Note:
        The data comes without a split. This one is scikit-learn's
        `train_test_split(test_size=0.2, random_state=0)`.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # RandomState, since NumPy promises its stream for ever, and not default_rng's.
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return DataSet(
        name="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        num_classes=10,
        scale=16.0,
        mean=MEAN,
        std=STD,
        augment=None,
    )
