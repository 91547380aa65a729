"""Every leaf of any pytree has one name, and only named leaves are replaced."""

from typing import NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import pytest

from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves


class Layer(NamedTuple):
    kernel: float
    bias: float


NESTED = {
    "layer1": {"block0": {"conv1": {"kernel": 1.0}}},
    "stack": (Layer(2.0, 3.0), [4.0, {"w": 5.0}]),
}


def test_paths_join_keys_positions_and_fields_with_slashes() -> None:
    assert leaves_by_path(NESTED) == {
        "layer1/block0/conv1/kernel": 1.0,
        "stack/0/kernel": 2.0,
        "stack/0/bias": 3.0,
        "stack/1/0": 4.0,
        "stack/1/1/w": 5.0,
    }


def test_paths_come_in_the_order_of_the_tree() -> None:
    tree = {"b": {"y": 1.0, "x": 2.0}, "a": 3.0}
    assert list(leaves_by_path(tree).values()) == jax.tree.leaves(tree)


def test_a_frozen_dict_has_the_paths_of_a_dict() -> None:
    tree = {"fc": {"kernel": 1.0, "bias": 2.0}}
    assert leaves_by_path(flax.core.freeze(tree)) == leaves_by_path(tree)


def test_replacing_changes_the_named_leaves_only() -> None:
    changed = replace_leaves(NESTED, {"stack/0/bias": 30.0, "stack/1/1/w": 50.0})
    assert changed == {
        "layer1": {"block0": {"conv1": {"kernel": 1.0}}},
        "stack": (Layer(2.0, 30.0), [4.0, {"w": 50.0}]),
    }
    assert isinstance(changed["stack"][0], Layer)


def test_leaves_not_named_are_the_same_objects() -> None:
    tree = {"a": jnp.ones(3), "b": jnp.ones(3)}
    assert replace_leaves(tree, {"b": jnp.zeros(3)})["a"] is tree["a"]


def test_a_path_with_and_one_without_value_are_the_same_leaf() -> None:
    for tree, path in (({"w": {"value": 1}}, "w"), ({"w": 1}, "w/value")):
        assert jax.tree.leaves(replace_leaves(tree, {path: 2})) == [2]


def test_an_unknown_path_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(KeyError) as caught:
        replace_leaves({"fc1": 1.0, "fc2": 2.0}, {"fc3": 0.0})
    for part in ("fc3", "fc1", "fc2"):
        assert part in str(caught.value)


def test_two_leaves_of_one_name_are_an_error_that_names_it() -> None:
    ambiguous = {"a/b": 1.0, "a": {"b": 2.0}}
    with pytest.raises(ValueError, match="a/b"):
        leaves_by_path(ambiguous)
