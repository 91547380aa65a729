"""MNIST: 60,000 training and 10,000 test images of 28 x 28 grey pixels."""

from woodfisher_jax.data.array_records import read_splits
from woodfisher_jax.data.dataset import DataSet, Progress


def load(data_dir: str | None = None, progress: Progress | None = None) -> DataSet:
    """Loads MNIST as TFDS prepared it.

    Args:
        data_dir: the folder with prepared data sets; see `array_records.data_root`.
        progress: called now and then with (label, done, total).

    Returns:
        The data set: images uint8 [n, 28, 28, 1], ten classes, no augmentation.

    Raises:
        DataMissingError: the data is absent, incomplete or damaged.
    """
    train, test = read_splits("mnist", data_dir, progress)
    return DataSet(
        name="mnist",
        train=train,
        test=test,
        num_classes=10,
        scale=255.0,
        mean=(0.1307,),
        std=(0.3081,),
        augment=None,
    )
