"""Masks: which parameters have one, what they do, and exactly how many weights stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfisher_jax.options import OptionError
from woodfisher_jax.trees.masks import (
    apply_masks,
    by_path,
    check_masks,
    count,
    left_out,
    masks_tree,
    most_sparse,
    num_kept,
    sparsity,
    sparsity_by_path,
    traced_num_kept,
)
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.trees.prunable import init_masks

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)},
    "fc": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
}


# --------------------------------------------------------------------- checking


@pytest.mark.parametrize(
    ("masks", "error", "parts"),
    [
        ({}, ValueError, ["masks={}", "no mask", "fc/kernel", "bool"]),
        ({"fc": None}, ValueError, ["masks={'fc': None}", "no mask", "fc/kernel"]),
        (jnp.ones(3, bool), ValueError, ["masks is a single array", "fc/kernel"]),
        (jnp.ones(3), TypeError, ["masks has dtype float32", "True = kept"]),
        (3, TypeError, ["masks is of type int", "True = kept"]),
        (
            {"fc/kernal": jnp.ones((4, 5), bool)},
            ValueError,
            ["fc/kernal", "not in params", "fc/kernel"],
        ),
        (
            {"fc/kernel": jnp.ones((5, 4), bool)},
            ValueError,
            ["masks", "fc/kernel", "(5, 4)", "(4, 5)"],
        ),
        (
            {"fc/kernel": jnp.ones((4, 5))},
            TypeError,
            ["masks", "fc/kernel", "float32", "bool"],
        ),
    ],
)
def test_masks_that_do_not_fit_are_errors_that_say_how(masks, error, parts) -> None:
    with pytest.raises(error) as caught:
        check_masks(PARAMS, masks)
    for part in parts:
        assert part in str(caught.value)


def test_masks_of_a_tree_with_a_single_array_say_so() -> None:
    with pytest.raises(
        OptionError, match="'fc', which is not in params: that is a sin"
    ):
        apply_masks(jnp.ones(3), {"fc": jnp.ones(3, bool)})


def test_the_sparsity_of_no_mask_is_refused() -> None:
    with pytest.raises(OptionError, match=r"masks=\{'fc': None\} has no mask"):
        sparsity({"fc": None})


# ----------------------------------------------------------- as a tree of the params


MASKS = {
    "fc/kernel": jnp.arange(20).reshape(4, 5) % 3 == 0,
    "conv/kernel": jnp.ones(PARAMS["conv"]["kernel"].shape, bool),
}


def test_a_tree_of_masks_has_the_structure_of_the_parameters_and_is_taken_back() -> (
    None
):
    tree = masks_tree(PARAMS, MASKS)
    assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
    product = jax.tree.map(jnp.multiply, PARAMS, tree)
    jax.tree.map(np.testing.assert_array_equal, product, apply_masks(PARAMS, MASKS))
    assert jax.tree.map(lambda mask: bool(mask.all()), tree)["fc"]["bias"]
    for masks in (
        tree,
        masks_tree(PARAMS, tree),
        {**tree, "conv": tree["conv"] | {"bias": None}},
    ):
        found = check_masks(PARAMS, masks)
        assert found.keys() == MASKS.keys()
        np.testing.assert_array_equal(found["fc/kernel"], MASKS["fc/kernel"])
    assert sparsity(tree) == sparsity(MASKS)
    assert sparsity_by_path(tree) == sparsity_by_path(MASKS)


def test_a_tree_with_none_for_what_is_not_prunable() -> None:
    tree = {"fc": {"kernel": MASKS["fc/kernel"], "bias": None}, "conv": None}
    assert list(by_path(tree)) == ["fc/kernel"]
    applied = apply_masks(PARAMS, tree)
    assert int(jnp.count_nonzero(applied["fc"]["kernel"])) == 7


def test_masks_of_a_list_and_of_a_bare_array() -> None:
    mask = jnp.array([True, False])
    assert list(check_masks([jnp.ones(3), jnp.ones(2)], [None, mask])) == ["1"]
    assert apply_masks(jnp.ones(2), mask).tolist() == [1, 0]


def test_optax_masked_takes_a_bool_for_each_parameter() -> None:
    prunable = jax.tree.map(lambda mask: mask.ndim > 0, masks_tree(PARAMS, MASKS))
    decay = optax.masked(optax.add_decayed_weights(0.5), prunable)
    updates, _ = decay.update(
        jax.tree.map(jnp.zeros_like, PARAMS), decay.init(PARAMS), PARAMS
    )
    assert not updates["fc"]["bias"].any()
    assert updates["fc"]["kernel"].all()


@pytest.mark.parametrize("given", ["kernel", "kernel/value"])
@pytest.mark.parametrize("path", ["kernel", "kernel/value"])
def test_paths_with_and_without_value_are_the_same_weight(path, given) -> None:
    """The variables of Flax NNX have both, depending on what the tree is made of."""
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    if path.endswith("value"):
        params = {name: {"value": leaf} for name, leaf in params.items()}
    masks = {given: jnp.array([True, False])}
    assert list(check_masks(params, masks)) == [path]
    assert leaves_by_path(apply_masks(params, masks))[path].tolist() == [1, 0]
    assert list(init_masks(params, "kernel$")) == [path]


# --------------------------------------------------------------------- applying


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pruned_weights_become_positive_zero_whatever_they_were(dtype) -> None:
    weights = jnp.asarray([-1.0, np.inf, -np.inf, np.nan, 2.0, -0.0], dtype)
    mask = jnp.asarray([False, False, False, False, True, False])
    masked = apply_masks({"w": weights}, {"w": mask})["w"]
    assert masked.dtype == dtype
    expected = np.asarray([0.0, 0.0, 0.0, 0.0, 2.0, 0.0])
    np.testing.assert_array_equal(np.asarray(masked, np.float64), expected)
    assert not np.signbit(np.asarray(masked, np.float64)).any()


def test_parameters_without_a_mask_pass_untouched() -> None:
    masks = {"fc/kernel": jnp.zeros((4, 5), bool)}
    masked = apply_masks(PARAMS, masks)
    assert masked["conv"]["kernel"] is PARAMS["conv"]["kernel"]
    assert masked["fc"]["bias"] is PARAMS["fc"]["bias"]
    assert bool(jnp.all(PARAMS["fc"]["kernel"] == 1))


# --------------------------------------------------------------------- counting


def test_sparsity_is_the_share_of_pruned_weights_over_all_tensors() -> None:
    masks = {
        "a": jnp.asarray([True, False, False, False]),
        "b": jnp.ones((2, 3), bool),
    }
    assert count(masks) == (7, 10)
    assert sparsity(masks) == pytest.approx(0.3)
    assert sparsity_by_path(masks) == {"a": 0.75, "b": 0.0}


@pytest.mark.parametrize(
    ("weights", "target", "kept"),
    [
        (32_360, 0.95, 1_618),
        (32_360, 0.9, 3_236),
        (32_360, 0.5, 16_180),
        (25_502_912, 0.9, 2_550_291),
        (10, 0.0, 10),
        (1, 0.5, 0),
        (3, 0.5, 1),
        (12, 0.6, 4),
    ],
)
def test_as_many_stay_as_the_target_allows(weights, target, kept) -> None:
    assert num_kept(weights, target) == kept


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(1, 10**8), st.integers(0, 9999))
def test_the_target_is_reached_by_as_few_as_possible(weights, tenthousandths) -> None:
    # Exact in integers: floor(n (10000 - s) / 10000).
    expected = weights * (10_000 - tenthousandths) // 10_000
    assert num_kept(weights, tenthousandths / 10_000) == expected


EDGES = [0, 1, 2, 99, 333_333, 499_999, 500_000, 900_000, 999_998, 999_999]
MILLIONTHS = [*EDGES, *np.random.default_rng(0).integers(0, 10**6, 200).tolist()]


@pytest.mark.parametrize(
    "weights",
    [1, 2, 1023, 1024, 10**6 - 1, 10**6, 10**6 + 1, 25_502_912, 2**31 - 2**20],
)
def test_a_traced_sparsity_counts_as_a_number_does(weights) -> None:
    random = np.random.default_rng(weights)
    for n in (weights, *random.integers(1, 2 * 10**9, 20).tolist()):
        found = traced_num_kept(n, jnp.asarray(MILLIONTHS) / 1e6)
        expected = [n * (10**6 - m) // 10**6 for m in MILLIONTHS]
        np.testing.assert_array_equal(found, expected)
        numbers = [num_kept(n, m / 1e6) for m in MILLIONTHS]
        np.testing.assert_array_equal(numbers, expected)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(1, 10**6), st.floats(0, 0.999), st.floats(0, 0.999))
def test_a_higher_sparsity_never_keeps_more(weights, first, second) -> None:
    low, high = sorted((first, second))
    assert num_kept(weights, high) <= num_kept(weights, low)


def test_the_largest_sparsity_that_leaves_one_is_nearly_that() -> None:
    for n in (1, 2, 3, 7, 10, 15, 999, 32_360, 25_000_000):
        assert num_kept(n, most_sparse(n)) >= 1
        assert num_kept(n, most_sparse(n) + 0.2 / n) == 0


def test_parameters_in_place_of_masks_are_refused() -> None:
    for call in (
        lambda: sparsity(PARAMS),
        lambda: sparsity_by_path(PARAMS),
        lambda: apply_masks(MASKS, PARAMS),
    ):
        with pytest.raises(TypeError, match=r"masks.*float32; expected bool"):
            call()
    with pytest.raises(ValueError, match="'x', which is not in params"):
        apply_masks(PARAMS, {"x": jnp.ones(2, bool)})
    with pytest.raises(TypeError, match="is of type str; expected a boolean array"):
        sparsity({"w": "kept"})


def test_several_tensors_are_left_out_by_one_default() -> None:
    text = left_out("a", "c")
    assert text.startswith("leave them out by prunable=")
    assert left_out("a").startswith("leave it out by prunable=")
    chooses = eval(
        text.partition("prunable=")[2].partition(", with")[0], {"axes": "abc"}
    )
    assert [path for path in "abcd" if chooses(path, None)] == ["b"]
