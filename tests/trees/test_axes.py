"""Axes: letters, conventions, sizes and the order of entries."""

import numpy as np
import pytest

from woodfisher_jax.options import OptionError
from woodfisher_jax.trees.axes import WeightAxes, conventional, given_axes

PARAMS = {
    "conv/w": np.ones((8, 4, 3, 3)),
    "dense/w": np.ones((5, 8)),
    "bias": np.ones(5),
}


def test_entries_are_read_layer_by_layer_output_by_output() -> None:
    axes = WeightAxes((3, 4, 5, 6), "kosi")
    assert axes.order == (2, 1, 3, 0)
    assert axes.sizes == (5, 4, 6, 3)


def test_without_roles_a_tensor_is_read_as_it_lies() -> None:
    axes = WeightAxes((3, 4))
    assert axes.order == (0, 1)
    assert axes.sizes == (1, 12, 1, 1)


@pytest.mark.parametrize(
    ("path", "shape", "roles", "certain"),
    [
        ("a/kernel", (3, 4), "io", True),
        ("a/kernel/value", (3, 3, 4, 8), "kkio", True),
        ("a/kernel", (3, 4, 8), "kio", False),
        ("a/weight", (3, 4), "", False),
        ("a/kernel", (3,), "", False),
    ],
)
def test_conventions_are_certain_of_dense_layers_and_images(
    path: str, shape: tuple[int, ...], roles: str, certain: bool
) -> None:
    axes = conventional(path, shape)
    assert axes.roles == roles
    assert certain != bool(axes.doubt)


def test_letters_are_given_by_expression_and_the_last_one_counts() -> None:
    found = given_axes({"^conv": "iokk", "dense": "oi", "v.w": "oikk"}, PARAMS)
    assert found == {
        "conv/w": WeightAxes((8, 4, 3, 3), "oikk"),
        "dense/w": WeightAxes((5, 8), "oi"),
    }


def test_axes_of_other_tensors_do_not_count_where_each_has_its_own() -> None:
    own = {"conv/w": WeightAxes((8, 4, 3, 3), "oikk"), "fc/w": WeightAxes((5, 8), "oi")}
    part = {"conv/w": PARAMS["conv/w"]}
    assert given_axes(own, part) == {"conv/w": own["conv/w"]}
    with pytest.raises(OptionError, match=r"'fc/w', .* has nothing of 'dense/w'"):
        given_axes(own, part | {"dense/w": PARAMS["dense/w"]})


def test_a_path_with_value_is_the_one_without() -> None:
    axes = WeightAxes((5, 8), "oi")
    assert given_axes({"w/value": axes}, {"w": np.ones((5, 8))}) == {"w": axes}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"conv": "oik"}, "'conv/w' of shape"),
        ({"dense": "ox"}, "one letter for each axis"),
        ({"dense": 3}, "axes=3"),
        ({"fc": "oi"}, "'fc', which is none"),
        ({"dense/w": WeightAxes((5, 9), "oi")}, r"expected \(5, 8\)"),
    ],
)
def test_axes_that_do_not_fit_are_named(axes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        given_axes(axes, PARAMS)
