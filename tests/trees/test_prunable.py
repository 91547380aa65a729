"""Which parameters have a mask."""

import jax.numpy as jnp
import pytest

from woodfisher_jax.options import OptionError
from woodfisher_jax.trees.prunable import init_masks

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)},
    "fc": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
}


def test_arrays_of_two_or_more_dimensions_are_prunable_by_default() -> None:
    assert set(init_masks(PARAMS)) == {"conv/kernel", "fc/kernel"}


@pytest.mark.parametrize(
    "name",
    ["embed/w", "pos_emb", "wpe", "h/wte", "pe", "norm/scale", "latents", "codebook"],
)
def test_what_may_be_an_embedding_or_a_position_is_refused_by_name(name) -> None:
    with pytest.raises(OptionError, match=f"'{name}' of shape .* without a loss"):
        init_masks({"fc": jnp.ones((4, 5)), name: jnp.ones((6, 4))})
    kernel = f"{name}/kernel"
    assert list(init_masks({kernel: jnp.ones((6, 4))})) == [kernel]
    chosen = init_masks({"fc": jnp.ones((4, 5)), name: jnp.ones((6, 4))}, "fc")
    assert list(chosen) == ["fc"]


@pytest.mark.parametrize(
    ("prunable", "paths"),
    [
        ("^fc/", {"fc/kernel", "fc/bias"}),
        ("kernel", {"conv/kernel", "fc/kernel"}),
        (lambda path, leaf: leaf.size > 18, {"fc/kernel"}),
        (lambda path, leaf: path.endswith("bias"), {"conv/bias", "fc/bias"}),
    ],
)
def test_a_predicate_or_an_expression_selects(prunable, paths) -> None:
    assert set(init_masks(PARAMS, prunable)) == paths


@pytest.mark.parametrize("prunable", [lambda: True, lambda path, leaf: leaf.ndims])
def test_a_predicate_that_fails_is_named(prunable) -> None:
    with pytest.raises(OptionError, match=r"^prunable fails on .*Error: .*\(path, arr"):
        init_masks(PARAMS, prunable)


@pytest.mark.parametrize("prunable", ["^layer", lambda path, leaf: False])
def test_selecting_nothing_is_an_error_that_lists_the_parameters(prunable) -> None:
    with pytest.raises(ValueError, match="prunable") as caught:
        init_masks(PARAMS, prunable)
    for part in ("selects none", "conv/kernel", "(4, 5)", "expected"):
        assert part in str(caught.value)


def test_a_malformed_expression_is_an_error_that_shows_it() -> None:
    with pytest.raises(ValueError, match=r"prunable='\(fc'.*regular expression"):
        init_masks(PARAMS, "(fc")
