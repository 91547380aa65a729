"""Images read from files: any part of a list alone, and what becomes of bad files."""

import dataclasses
import functools
import io
import logging
import threading

import numpy as np
import pytest
from PIL import Image

from woodfisher_jax import data
from woodfisher_jax.data.batches import _stream
from woodfisher_jax.data.streams import (
    NO_IMAGE,
    BadImagesError,
    ImageOptions,
    ImageStream,
)

SMALL = ImageOptions(image_size=8, resize=10, max_bad_images=2)


def randomness(seed, *place):
    """A generator for each image, as `batches` makes them."""
    return functools.partial(_stream, seed, *place)


RANDOM = randomness(3, 1, 2)


@functools.cache
def picture(index):
    """A PNG of 24 x 18 pixels of noise around a level of its own."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(10 * index, 10 * index + 10, size=(18, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A source of images with labels 0, 1, 2, ..., some of which are damaged."""

    size: int = 20
    damaged: tuple[int, ...] = ()

    def read(self, index):
        content = picture(index)
        return content[: 100 if index in self.damaged else None], index

    def place(self, index):
        return f"picture-{index}.png"


def stream(options=SMALL, **source):
    return ImageStream("mine train", Pictures(**source), options)


def read(images, order, batch_size=4, randomness=RANDOM, substitute=True):
    return list(
        images.read(
            np.asarray(order),
            batch_size,
            randomness,
            substitute=substitute,
            finish=lambda pixels: pixels.astype(np.float32),
        )
    )


def joined(batches):
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_batches_have_the_form_asked_for():
    batches = read(stream(), range(10))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
    whole = joined(batches)
    assert whole.keys() == {"image", "label", "weight"}
    assert whole["image"].shape == (10, 8, 8, 3)
    assert whole["image"].dtype == whole["weight"].dtype == np.float32
    assert whole["label"].dtype == np.int32
    assert whole["label"].tolist() == list(range(10))
    assert whole["weight"].tolist() == [1.0] * 10
    # Image and label belong together: the level of the pixels is ten times the label.
    levels = whole["image"].mean(axis=(1, 2, 3)) // 10
    np.testing.assert_array_equal(levels, whole["label"])


@pytest.mark.parametrize("autoaugment", [False, True])
def test_an_image_is_the_same_wherever_it_is_read(autoaugment):
    images = stream(SMALL.replace(autoaugment=autoaugment))
    whole = joined(read(images, range(20)))
    order = [7, 3, 19, 3]
    some = joined(read(images, order, batch_size=3))
    for key in whole:
        np.testing.assert_array_equal(some[key], whole[key][order])


def test_randomness_is_of_the_seed_the_place_and_the_image():
    images = stream()
    found = [
        joined(read(images, [5, 6], randomness=given))["image"].tobytes()
        for given in (
            RANDOM,
            randomness(4, 1, 2),
            randomness(3, 1, 3),
            randomness(3, 2, 2),
            None,
        )
    ]
    assert len(set(found)) == 5
    plain = joined(read(images, [5, 5], randomness=None))["image"]
    np.testing.assert_array_equal(plain[0], plain[1])


def test_autoaugment_is_for_training_alone():
    plain, changed = (
        stream(SMALL.replace(autoaugment=autoaugment)) for autoaugment in (False, True)
    )
    first, second = (joined(read(s, range(20)))["image"] for s in (plain, changed))
    assert (first != second).any(axis=(1, 2, 3)).sum() > 5
    first, second = (
        joined(read(s, range(9), randomness=None)) for s in (plain, changed)
    )
    assert_equal(first, second)


def test_no_image_is_zeros_of_no_weight():
    whole = joined(read(stream(), [1, NO_IMAGE, 2, NO_IMAGE]))
    assert whole["weight"].tolist() == [1, 0, 1, 0]
    assert whole["label"].tolist() == [1, 0, 2, 0]
    assert not whole["image"][[1, 3]].any()
    assert whole["image"][[0, 2]].any(axis=(1, 2, 3)).all()


@pytest.mark.slow
def test_processes_read_the_same_as_threads_and_tell_what_is_bad():
    order = [*range(7), NO_IMAGE, *range(7, 20)]
    images = stream(damaged=(4, 11))
    expected = read(images, order)
    workers = stream(SMALL.replace(workers=2), damaged=(4, 11))
    for one, other in zip(read(workers, order), expected, strict=True):
        assert_equal(one, other)
        assert {type(value) for value in one.values()} == {np.ndarray}
    assert workers.bad == images.bad
    assert len(workers.bad) == 2


def test_a_reader_that_is_left_early_leaves_no_threads():
    before = set(threading.enumerate())
    batches = stream().read(
        np.arange(20), 2, RANDOM, substitute=True, finish=lambda pixels: pixels.copy()
    )
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()


# --------------------------------------------------------------------------- bad files


def test_a_damaged_image_is_named_and_the_next_good_one_takes_its_place(caplog):
    images = stream(damaged=(5, 6))
    with caplog.at_level(logging.WARNING):
        whole = joined(read(images, [4, 5, 6, 7]))
    assert whole["label"].tolist() == [4, 7, 7, 7]
    assert whole["weight"].tolist() == [1.0] * 4
    assert list(images.bad) == ["picture-5.png", "picture-6.png"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "mine train: image picture-5.png cannot be read (" in messages[0]
    assert "2 so far, at most 2" in messages[1]
    # Once is enough, and it is the same the next time.
    caplog.clear()
    assert_equal(joined(read(images, [4, 5, 6, 7])), whole)
    assert not caplog.records


def test_the_image_after_the_last_is_the_first():
    assert joined(read(stream(damaged=(19,)), [19]))["label"].tolist() == [0]


def test_too_many_damaged_images_are_an_error_with_their_names():
    images = stream(damaged=(2, 9, 15))
    with pytest.raises(BadImagesError) as caught:
        read(images, range(20))
    text = str(caught.value)
    assert "mine train: 3 images cannot be read" in text
    assert "config.data.max_bad_images=2" in text
    for index in (2, 9, 15):
        assert f"picture-{index}.png: " in text


def test_no_damaged_image_may_be_left_out_if_so_asked():
    images = stream(SMALL.replace(max_bad_images=0), damaged=(3,))
    with pytest.raises(BadImagesError, match=r"picture-3.png"):
        read(images, range(20))


def test_a_row_of_damaged_images_longer_than_the_limit():
    with pytest.raises(BadImagesError, match="3 images cannot be read"):
        read(stream(damaged=tuple(range(5, 12))), [5])


def test_nothing_but_damaged_images():
    with pytest.raises(BadImagesError, match="2 images cannot be read"):
        read(stream(size=2, damaged=(0, 1)), [0])


def test_a_damaged_image_of_an_evaluation_has_no_weight_and_no_substitute():
    images = stream(damaged=(1,))
    whole = joined(read(images, range(4), randomness=None, substitute=False))
    assert whole["weight"].tolist() == [1, 0, 1, 1]
    assert whole["label"].tolist() == [0, 0, 2, 3]
    assert list(images.bad) == ["picture-1.png"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 0}, "image_size=0; expected a whole number from 1"),
        (
            {"image_size": 300, "resize": 256},
            "resize=256; expected image_size=300 or more",
        ),
        ({"mean": (0.5,)}, r"mean=\(0.5,\); expected three numbers"),
        ({"std": (0.0, 1.0, 1.0)}, r"std=\(0.0, 1.0, 1.0\); expected values in brack"),
        ({"workers": -1}, "workers=-1; expected a whole number from 0"),
        ({"prefetch": 0}, "prefetch=0; expected a whole number from 1"),
        ({"max_bad_images": -1}, "max_bad_images=-1; expected a whole number from 0"),
    ],
)
def test_options_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        ImageOptions(**changed)


# ------------------------------------------------------------------- batches of a set


@pytest.fixture
def dataset():
    return data.DataSet(
        "mine", stream(), stream(size=7), 20, 255.0, (0.5,) * 3, (0.2,) * 3, None
    )


def test_an_epoch_has_each_image_once_in_an_order_of_its_own(dataset):
    orders = []
    for epoch in range(2):
        batches = list(
            data.epoch_batches(
                dataset, seed=0, epoch=epoch, start=0, stop=5, batch_size=4
            )
        )
        assert all(batch.keys() == {"image", "label"} for batch in batches)
        orders.append(joined(batches)["label"])
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(20))
    assert (orders[0] != orders[1]).any()


def test_resuming_at_any_step_is_exact(dataset):
    place = {"seed": 1, "epoch": 2, "batch_size": 4}
    whole = list(data.epoch_batches(dataset, start=0, stop=5, **place))
    rest = list(data.epoch_batches(dataset, start=3, stop=5, **place))
    for found, expected in zip(rest, whole[3:], strict=True):
        assert_equal(found, expected)
    alone = list(data.epoch_batches(dataset, start=2, stop=3, **place))
    assert_equal(alone[0], whole[2])
    assert list(data.epoch_batches(dataset, start=5, stop=5, **place)) == []


def test_augment_off_is_the_middle_of_the_same_images(dataset):
    place = {"seed": 1, "epoch": 0, "start": 0, "stop": 1, "batch_size": 4}
    (plain,) = data.epoch_batches(dataset, augment=False, **place)
    (changed,) = data.epoch_batches(dataset, **place)
    np.testing.assert_array_equal(plain["label"], changed["label"])
    assert (plain["image"] != changed["image"]).any()
    swapped = dataset._replace(test=dataset.train)
    middle = joined(list(data.test_batches(swapped, 20)))["image"]
    np.testing.assert_array_equal(plain["image"], middle[plain["label"]])


@pytest.mark.parametrize("count", [2, 4])
def test_shards_put_together_are_the_batch(dataset, count):
    place = {"seed": 1, "epoch": 2, "start": 1, "stop": 3, "batch_size": 8}
    dataset = dataset._replace(train=stream(size=24))
    shards = [
        list(data.epoch_batches(dataset, shard=(index, count), **place))
        for index in range(count)
    ]
    whole = data.epoch_batches(dataset, **place)
    for *parts, expected in zip(*shards, whole, strict=True):
        assert_equal(joined(parts), expected)


@pytest.mark.parametrize(
    ("batch_size", "count"), [(3, 1), (7, 1), (4, 2), (5, 3), (9, 4)]
)
def test_every_test_image_counts_once(dataset, batch_size, count):
    shards = [
        list(data.test_batches(dataset, batch_size, (index, count)))
        for index in range(count)
    ]
    shapes = {batch["image"].shape for shard in shards for batch in shard}
    assert len(shapes) == 1
    assert len({len(shard) for shard in shards}) == 1
    whole = joined([joined(list(parts)) for parts in zip(*shards, strict=True)])
    real = whole["weight"] == 1
    np.testing.assert_array_equal(whole["label"][real], np.arange(7))
    assert not whole["image"][~real].any()


def test_fisher_samples_are_read_when_needed_and_the_same_each_time(dataset):
    place = {"seed": 2, "draw": 1, "count": 9}
    samples = data.fisher_samples(dataset, **place)
    first, again = joined(list(samples)), joined(list(samples))
    assert samples.size == 9
    assert_equal(first, again)
    assert len(set(first["label"].tolist())) == 9
    fewer = data.fisher_samples(dataset, **(place | {"count": 4}))
    assert_equal(joined(list(fewer)), {key: first[key][:4] for key in first})
    changed = joined(list(data.fisher_samples(dataset, augment=True, **place)))
    np.testing.assert_array_equal(changed["label"], first["label"])
    assert (changed["image"] != first["image"]).any()


def test_batch_norm_batches(dataset):
    place = {"seed": 2, "draw": 0, "count": 9, "batch_size": 4}
    first = list(data.batch_norm_batches(dataset, **place))
    assert [len(batch["label"]) for batch in first] == [4, 4, 1]
    assert_equal(joined(first), joined(list(data.batch_norm_batches(dataset, **place))))
    plain = joined(list(data.batch_norm_batches(dataset, augment=False, **place)))
    np.testing.assert_array_equal(plain["label"], joined(first)["label"])
    assert (plain["image"] != joined(first)["image"]).any()


def test_fewer_images_than_a_batch(dataset):
    with pytest.raises(ValueError, match=r"batch_size: expected 1 to 20.*; got 21"):
        data.steps_per_epoch(dataset, 21)
    with pytest.raises(ValueError, match=r"count: expected 1 to 20, .*; got 21"):
        data.fisher_samples(dataset, seed=0, draw=0, count=21)
