"""Batches as pure functions of seed, epoch and step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfisher_jax import data
from woodfisher_jax.data.augment import crop_and_flip
from woodfisher_jax.data.batches import _epoch_order


def numbered(train=23, test=7, augment=None):
    """A data set whose every label is its own index and every pixel its label."""

    def split(count):
        labels = np.arange(count, dtype=np.int32)
        images = np.tile(labels[:, None, None, None], (1, 8, 8, 2)).astype(np.uint8)
        return data.Split(images, labels)

    return data.DataSet(
        "numbered", split(train), split(test), train, 10.0, (1.0, 2.0), (0.5, 4.0),
        augment,
    )  # fmt: skip


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def train_batch(dataset, *, step, **place):
    """One training batch, made alone."""
    (batch,) = data.epoch_batches(dataset, start=step, stop=step + 1, **place)
    return batch


def labels_of_epoch(dataset, seed, epoch, batch_size):
    stop = data.steps_per_epoch(dataset, batch_size)
    batches = data.epoch_batches(
        dataset, seed=seed, epoch=epoch, start=0, stop=stop, batch_size=batch_size
    )
    return np.concatenate([batch["label"] for batch in batches])


def test_normalize_is_the_formula_in_float32():
    dataset = numbered()
    images = np.arange(256, dtype=np.uint8).reshape(1, 8, 16, 2)
    result = data.normalize(dataset, images)
    assert result.dtype == np.float32
    expected = (images / 10.0 - np.array([1.0, 2.0])) / np.array([0.5, 4.0])
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    assert images.max() == 255  # the pixels are left alone


def test_train_batch_has_the_form_the_model_expects():
    batch = train_batch(numbered(), seed=0, epoch=0, step=0, batch_size=4)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (4, 8, 8, 2)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (4,)
    assert batch["label"].dtype == np.int32
    # Image and label belong together.
    np.testing.assert_allclose(
        batch["image"][:, 0, 0, 0], (batch["label"] / 10 - 1) / 0.5, rtol=1e-5
    )


@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 500),
    batch_size=st.integers(1, 23),
)
def test_an_epoch_has_each_example_at_most_once(seed, epoch, batch_size):
    labels = labels_of_epoch(numbered(), seed, epoch, batch_size)
    assert len(labels) == 23 // batch_size * batch_size
    assert len(set(labels.tolist())) == len(labels)


def test_an_epoch_without_remainder_has_each_example_once():
    labels = labels_of_epoch(numbered(train=24), 3, 5, 8)
    np.testing.assert_array_equal(np.sort(labels), np.arange(24))


def test_seeds_and_epochs_differ_in_order():
    dataset = numbered(train=200)
    orders = [
        tuple(labels_of_epoch(dataset, seed, epoch, 100).tolist())
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_a_batch_made_alone_is_the_batch_made_in_turn():
    dataset = numbered(augment=crop_and_flip)
    place = {"seed": 7, "epoch": 2, "batch_size": 5}
    in_turn = [train_batch(dataset, step=step, **place) for step in range(4)]
    _epoch_order.cache_clear()
    assert_equal(in_turn[2], train_batch(dataset, step=2, **place))


def test_augmentation_changes_images_and_not_their_choice():
    dataset = numbered(train=23, augment=crop_and_flip)
    place = {"seed": 0, "epoch": 0, "step": 1, "batch_size": 10}
    plain = train_batch(dataset, augment=False, **place)
    changed = train_batch(dataset, **place)
    np.testing.assert_array_equal(plain["label"], changed["label"])
    assert (plain["image"] != changed["image"]).any()
    assert_equal(plain, train_batch(numbered(), **place))  # no way to augment


def test_padding_of_a_crop_is_black_before_normalisation():
    dataset = numbered(augment=crop_and_flip)
    dataset.train.images[:] = 30
    image = train_batch(dataset, seed=0, epoch=0, step=0, batch_size=20)["image"]
    black = data.normalize(dataset, np.zeros((1, 2), np.uint8))[0]
    bright = data.normalize(dataset, np.full((1, 2), 30, np.uint8))[0]
    assert {tuple(pixel) for pixel in image.reshape(-1, 2).tolist()} == {
        tuple(black.tolist()),
        tuple(bright.tolist()),
    }


def test_each_step_augments_in_its_own_way():
    dataset = numbered(augment=lambda rng, images: images + rng.integers(200))
    dataset.train.images[:] = 0
    added = {
        train_batch(dataset, seed=seed, epoch=epoch, step=step, batch_size=10)["image"][
            0, 0, 0, 0
        ].item()
        for seed in range(2)
        for epoch in range(2)
        for step in range(2)
    }
    assert len(added) == 8


@pytest.mark.parametrize("batch_size", [0, -1, 24])
def test_batch_size_out_of_range(batch_size):
    with pytest.raises(ValueError, match=f"batch_size: expected 1 to 23.*{batch_size}"):
        data.steps_per_epoch(numbered(), batch_size)
    with pytest.raises(ValueError, match="batch_size"):
        train_batch(numbered(), seed=0, epoch=0, step=0, batch_size=batch_size)


@given(total=st.integers(1, 30), batch_size=st.integers(1, 40))
def test_test_batches_count_every_image_once(total, batch_size):
    dataset = numbered(test=total)
    batches = list(data.test_batches(dataset, batch_size))
    assert len(batches) == -(-total // batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 8, 8, 2)
        assert batch["label"].shape == batch["weight"].shape == (batch_size,)
        assert batch["weight"].dtype == batch["image"].dtype == np.float32
        assert batch["label"].dtype == np.int32
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert set(weight.tolist()) <= {0.0, 1.0}
    assert weight.sum() == total
    real = weight == 1
    label = np.concatenate([batch["label"] for batch in batches])
    image = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(label[real], np.arange(total))
    np.testing.assert_array_equal(
        image[real], data.normalize(dataset, dataset.test.images)
    )
    assert not image[~real].any()


def test_test_batches_reject_a_batch_size_at_once():
    with pytest.raises(ValueError, match="batch_size: expected 1 or more; got 0"):
        data.test_batches(numbered(), 0)


@given(seed=st.integers(0, 2**40), draw=st.integers(0, 100), count=st.integers(1, 23))
def test_fisher_samples_are_drawn_without_replacement(seed, draw, count):
    batch = data.fisher_samples(numbered(), seed=seed, draw=draw, count=count)
    assert len(set(batch["label"].tolist())) == count
    assert_equal(
        batch, data.fisher_samples(numbered(), seed=seed, draw=draw, count=count)
    )
    whole = data.fisher_samples(numbered(), seed=seed, draw=draw, count=23)
    np.testing.assert_array_equal(batch["label"], whole["label"][:count])


def test_fisher_samples_are_independent_of_seed_draw_and_training_order():
    dataset = numbered(train=200)
    orders = [
        tuple(
            data.fisher_samples(dataset, seed=seed, draw=draw, count=200)[
                "label"
            ].tolist()
        )
        for seed in range(3)
        for draw in range(3)
    ]
    orders += [
        tuple(labels_of_epoch(dataset, seed, epoch, 200).tolist())
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_fisher_samples_are_augmented_only_when_asked():
    dataset = numbered(augment=crop_and_flip)
    place = {"seed": 1, "draw": 0, "count": 20}
    plain = data.fisher_samples(dataset, **place)
    assert_equal(plain, data.fisher_samples(numbered(), **place))
    changed = data.fisher_samples(dataset, augment=True, **place)
    np.testing.assert_array_equal(plain["label"], changed["label"])
    assert (plain["image"] != changed["image"]).any()
    assert_equal(changed, data.fisher_samples(dataset, augment=True, **place))


@pytest.mark.parametrize("count", [0, 24])
def test_fisher_samples_out_of_range(count):
    with pytest.raises(ValueError, match=f"count: expected 1 to 23.*; got {count}"):
        data.fisher_samples(numbered(), seed=0, draw=0, count=count)


def test_batch_norm_batches_cover_as_many_examples_as_asked_for():
    place = {"seed": 2, "draw": 1, "count": 17, "batch_size": 5}
    batches = list(data.batch_norm_batches(numbered(), **place))
    assert [len(batch["label"]) for batch in batches] == [5, 5, 5, 2]
    assert len({label for b in batches for label in b["label"].tolist()}) == 17
    other = data.fisher_samples(numbered(), seed=2, draw=1, count=5)
    assert (batches[0]["label"] != other["label"]).any()


def test_batch_norm_batches_are_the_same_each_time_and_augmented_unless_told():
    dataset = numbered(augment=crop_and_flip)
    place = {"seed": 2, "draw": 0, "count": 9, "batch_size": 4}
    first, again, plain = (
        list(data.batch_norm_batches(dataset, augment=augment, **place))
        for augment in (True, True, False)
    )
    for one, two, bare in zip(first, again, plain, strict=True):
        assert_equal(one, two)
        np.testing.assert_array_equal(one["label"], bare["label"])
        assert (one["image"] != bare["image"]).any()


@pytest.mark.parametrize(("count", "batch_size"), [(24, 4), (0, 4), (4, 0)])
def test_batch_norm_batches_out_of_range(count, batch_size):
    with pytest.raises(ValueError, match="expected 1 "):
        data.batch_norm_batches(
            numbered(), seed=0, draw=0, count=count, batch_size=batch_size
        )


def test_negative_seeds_and_places():
    for seed, place in ((-1, 0), (0, -2)):
        message = f"zero or above; got seed {seed} and epoch or draw {place}"
        with pytest.raises(ValueError, match=message):
            train_batch(numbered(), seed=seed, epoch=place, step=0, batch_size=2)
        with pytest.raises(ValueError, match=message):
            data.fisher_samples(numbered(), seed=seed, draw=place, count=2)


SHARDS = (1, 2, 4, 8)


@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 100),
    places=st.lists(st.integers(0, 2), min_size=2, max_size=2).map(sorted),
    count=st.sampled_from(SHARDS),
    augment=st.booleans(),
)
def test_shards_put_together_are_the_batch(seed, epoch, places, count, augment):
    dataset = numbered(augment=crop_and_flip)
    place = {"seed": seed, "epoch": epoch, "batch_size": 8, "augment": augment}
    start, stop = places
    shards = [
        list(
            data.epoch_batches(
                dataset, start=start, stop=stop, shard=(index, count), **place
            )
        )
        for index in range(count)
    ]
    for step, parts in enumerate(zip(*shards, strict=True), start):
        together = {
            key: np.concatenate([part[key] for part in parts]) for key in parts[0]
        }
        assert {len(part["label"]) for part in parts} == {8 // count}
        assert_equal(together, train_batch(dataset, step=step, **place))
    assert len(shards[0]) == stop - start


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 0), (0, 3)])
def test_steps_of_an_epoch_out_of_range(start, stop):
    message = f"start, stop: expected 0 <= start <= stop <= 2.*got {start} and {stop}"
    with pytest.raises(ValueError, match=message):
        data.epoch_batches(
            numbered(), seed=0, epoch=0, start=start, stop=stop, batch_size=10
        )


@pytest.mark.parametrize("shard", [(-1, 2), (2, 2), (0, 0)])
def test_no_such_shard(shard):
    place = {"seed": 0, "epoch": 0, "start": 0, "stop": 1, "batch_size": 4}
    for call in (
        lambda: data.epoch_batches(numbered(), shard=shard, **place),
        lambda: data.test_batches(numbered(), 4, shard),
    ):
        with pytest.raises(ValueError, match=r"shard: expected .*index < count; got"):
            call()


def test_training_batches_must_divide_by_the_number_of_shards():
    place = {"seed": 0, "epoch": 0, "start": 0, "stop": 1, "batch_size": 5}
    with pytest.raises(
        ValueError, match=r"batch_size: expected a multiple of 2.*got 5"
    ):
        data.epoch_batches(numbered(), shard=(0, 2), **place)


@given(total=st.integers(1, 30), batch_size=st.integers(1, 40), count=st.integers(1, 9))
def test_shards_of_test_batches_count_every_image_once(total, batch_size, count):
    dataset = numbered(test=total)
    shards = [
        list(data.test_batches(dataset, batch_size, (index, count)))
        for index in range(count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    assert len({b["image"].shape for shard in shards for b in shard}) == 1
    together = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    whole = data.test_batches(dataset, len(together[0]["label"]))
    for found, expected in zip(together, whole, strict=True):
        assert_equal(found, expected)
    assert sum(batch["weight"].sum() for batch in together) == total
