"""Each pruner has its own weights, and no weight has two."""

import jax.numpy as jnp
import pytest
from small_runs import small

from woodfisher_jax.training.config import ConfigError, PruneConfig
from woodfisher_jax.training.pruners import init_masks, selected_paths

PARAMS = {
    "fc1": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "fc2": {"kernel": jnp.ones((3, 2))},
    "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("fc1/kernel", "fc2/kernel")),
        ({"prunable": "fc2"}, ("fc2/kernel",)),
        ({"prune_biases": True}, ("fc1/bias", "fc1/kernel", "fc2/kernel")),
        ({"prunable": "fc1/k", "prune_biases": True}, ("fc1/bias", "fc1/kernel")),
    ],
)
def test_what_a_pruner_selects(settings: dict, expected: tuple) -> None:
    assert sorted(selected_paths(PARAMS, PruneConfig(**settings))) == sorted(expected)


def test_masks_are_over_what_all_select() -> None:
    config = small(prune__prunable="fc2", prune_2={"prunable": "fc1/kernel"})
    masks = init_masks(PARAMS, config)
    assert {path: mask.shape for path, mask in masks.items()} == {
        "fc1/kernel": (4, 3),
        "fc2/kernel": (3, 2),
    }
    assert all(mask.all() for mask in masks.values())


def test_a_weight_of_two_pruners_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        init_masks(PARAMS, small(prune_2={"prunable": "fc2"}))
    for words in ("config.prune.prunable=None", "prune_2.prunable='fc2'", "fc2/kernel"):
        assert words in str(caught.value)


def test_a_pruner_without_weights_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"config\.prune_2\.prunable='x'.*fc1"):
        init_masks(PARAMS, small(prune__prunable="fc1", prune_2={"prunable": "x"}))
