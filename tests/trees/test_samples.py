"""Streams of batches of any sizes, regrouped without losing or moving an example."""

import collections
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.trees.samples import (
    Examples,
    batch_length,
    num_examples,
    regroup,
    shapes_of,
)


class Pair(NamedTuple):
    x: np.ndarray
    y: np.ndarray


class Loader:
    """Something that can be iterated again and again, like a PyTorch loader."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def examples(start: int, stop: int) -> dict[str, np.ndarray]:
    numbers = np.arange(start, stop)
    return {"x": np.stack([numbers, -numbers], 1), "y": numbers.astype(np.int8)}


def stream(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    bounds = [0, *itertools.accumulate(lengths)]
    return [examples(a, b) for a, b in itertools.pairwise(bounds)]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12), st.booleans())
def test_regrouping_keeps_every_example_in_order(lengths, size, lazily) -> None:
    batches = stream(lengths)
    found = list(regroup(iter(batches) if lazily else batches, size))
    total = sum(lengths)
    full, rest = divmod(total, size)
    found_lengths = [len(b["y"]) for b in found if len(b["y"])]
    assert found_lengths == [size] * full + [rest] * (rest > 0)
    if total:
        joined = {k: np.concatenate([b[k] for b in found]) for k in ("x", "y")}
        for key, expected in examples(0, total).items():
            np.testing.assert_array_equal(joined[key], expected)
            assert joined[key].dtype == expected.dtype


@pytest.mark.parametrize(
    "batch",
    [
        np.arange(10),
        jnp.arange(10),
        (np.arange(10), np.ones((10, 2))),
        {"x": np.arange(10), "nested": (np.ones((10, 2, 2)),)},
        Pair(np.arange(10), np.ones(10)),
    ],
)
def test_any_pytree_of_arrays_is_a_batch(batch) -> None:
    assert num_examples(batch) == 10
    first = next(regroup(batch, 4))
    assert type(first) is (np.ndarray if hasattr(batch, "shape") else type(batch))
    assert batch_length(first) == 4


class Encoding(collections.UserDict):
    """A mapping that JAX does not know, like the batches of Hugging Face."""


def test_a_mapping_comes_as_a_dict() -> None:
    batch = Encoding(x=np.arange(10), nested=Encoding(y=np.ones((10, 2))))
    for samples in (batch, [batch], iter([batch])):
        first = next(regroup(samples, 4))
        assert type(first) is type(first["nested"]) is dict
        np.testing.assert_array_equal(first["x"], np.arange(4))
    assert num_examples(batch) == num_examples([batch]) == 10
    with pytest.raises(TypeError, match="got Encoding of str"):
        next(regroup(Encoding(text=["a", "b"]), 1))


@pytest.mark.parametrize("parts", [1, 2])
def test_typed_random_keys_are_regrouped(parts: int) -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    x = np.arange(6)
    stream = [(x[i::parts], keys[i::parts]) for i in range(parts)]
    found = list(regroup(stream, 4))
    assert [batch_length(batch) for batch in found] == [4, 2]
    joined = np.concatenate([jax.random.key_data(keys) for _, keys in found])
    order = np.concatenate([batch[0] for batch in found])
    np.testing.assert_array_equal(joined, jax.random.key_data(keys)[order])
    shapes = shapes_of(found[0], 9)
    assert (shapes[1].shape, shapes[1].dtype) == ((9,), keys.dtype)


def test_a_list_of_two_arrays_is_refused_where_it_may_be_one_batch() -> None:
    x, y = np.ones((6, 3)), np.zeros((6, 3))
    for call in (num_examples, lambda samples: next(regroup(samples, 2))):
        with pytest.raises(ValueError, match=r"list of two arrays.*a tuple, for one"):
            call([x, y])
    assert num_examples([x, y[:4]]) == 10
    assert num_examples([x, y, x]) == 18
    assert num_examples([(x, y), (y, x)]) == 12
    with pytest.raises(ValueError, match="of whole numbers or of floats"):
        num_examples([x, y, np.zeros((6, 3), int)])


def test_arrays_that_are_no_numbers_are_named() -> None:
    for array in (np.array(["a", "b"]), np.array([None, None])):
        with pytest.raises(TypeError, match=f"dtype {array.dtype}, which JAX"):
            next(regroup((np.ones(2), array), 1))


def test_only_reading_tells_how_many_an_iterable_holds() -> None:
    assert num_examples(iter(stream([3, 1]))) is None
    assert num_examples(Loader(stream([3, 1]))) is None
    assert num_examples(b for b in stream([3, 1])) is None


def test_a_stream_is_read_no_further_than_needed_and_stays_open() -> None:
    endless = (examples(i, i + 3) for i in itertools.count(0, 3))
    first = next(regroup(endless, 4))
    np.testing.assert_array_equal(first["y"], [0, 1, 2, 3])
    np.testing.assert_array_equal(next(endless)["y"], [6, 7, 8])


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        ((np.ones((3, 2)), np.ones(4)), ["agree", "(3, 2)", "(4,)"]),
        ((np.ones((3, 2)), np.float32(1)), ["leading axis", "()"]),
        ({}, ["leading axis", "[]"]),
    ],
)
def test_a_batch_without_one_length_is_an_error_that_shows_shapes(batch, parts) -> None:
    with pytest.raises(ValueError, match="samples") as caught:
        batch_length(batch)
    for part in parts:
        assert part in str(caught.value)


def test_batches_of_different_structure_are_an_error() -> None:
    mixed = [(np.ones(2), np.ones(2)), {"x": np.ones(2)}]
    with pytest.raises(ValueError, match=r"samples.*same structure"):
        list(regroup(mixed, 3))


def test_batches_of_different_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"samples.*same shapes"):
        list(regroup([np.ones((2, 3)), np.ones((2, 4))], 3))


def test_a_list_of_two_arrays_hints_at_the_tuple_that_was_meant() -> None:
    with pytest.raises(ValueError, match="tuple or dict, not a list"):
        list(regroup([np.ones((5, 3)), np.ones(5)], 6))


@pytest.mark.parametrize("samples", [3, {"x": 3}, {"x": [1, 2]}, "images"])
def test_what_is_no_stream_is_an_error_that_names_its_type(samples) -> None:
    with pytest.raises(TypeError, match="samples must be") as caught:
        list(regroup(samples, 2))
    assert type(samples).__name__ in str(caught.value)


def test_examples_are_counted_without_reading_and_read_again_each_time() -> None:
    times = []

    def read():
        times.append(1)
        return iter(stream([3, 4, 2]))

    samples = Examples(9, read)
    assert num_examples(samples) == 9
    assert not times
    for _ in range(2):
        assert [batch_length(b) for b in regroup(samples, 5)] == [5, 4]
    assert len(times) == 2
