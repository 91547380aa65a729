"""What weights cost in the choice of masks, against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.models import build_model
from woodfisher_jax.selection.costs import (
    Costs,
    flops_factors,
    keep_within_macs,
    macs_of,
)
from woodfisher_jax.tracing.macs import flat_costs, macs_per_weight, sparse_macs
from woodfisher_jax.trees.blocks import flat_order, flatten, unflatten
from woodfisher_jax.trees.masks import keep_highest
from woodfisher_jax.trees.paths import leaves_by_path

COSTS = {"a": 16.0, "b": 2.0}
MASKS = {"a": jnp.asarray([True, True, False]), "b": jnp.ones(5, bool)}


@pytest.mark.parametrize(
    ("power", "options", "expected"),
    [
        (0.5, {}, {"a": 1 / np.sqrt(32), "b": 1 / np.sqrt(10)}),
        (2, {"per_parameter": True}, {"a": 1 / 256, "b": 1 / 4}),
        (3, {"rescale": "log"}, {"a": 1 / 125, "b": np.log2(10) ** -3}),
        (0.0, {}, {"a": 1.0, "b": 1.0}),
    ],
)
def test_factors_are_powers_of_macs(power, options, expected) -> None:
    assert flops_factors(COSTS, MASKS, power, **options) == pytest.approx(expected)


def test_an_empty_layer_has_no_factor_and_a_free_one_none_to_take() -> None:
    masks = {**MASKS, "a": jnp.zeros(3, bool)}
    assert flops_factors(COSTS, masks, 1.0) == {"a": 1.0, "b": 0.1}
    assert flops_factors({"a": 0.0, "b": 2.0}, MASKS, 0.0) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="'a' counts 0 multiply"):
        flops_factors({"a": 0.0, "b": 2.0}, MASKS, 1.0)
    with pytest.raises(ValueError, match=r"'a' counts 1 multiply.*\(log\) 0"):
        flops_factors(
            {"a": 1.0, "b": 2.0}, MASKS, 1.0, per_parameter=True, rescale="log"
        )


def test_macs_under_a_mask() -> None:
    order = flat_order(MASKS)
    found = macs_of(flatten(order, MASKS), order, Costs(COSTS, 7.0, 100.0))
    assert found == 7 + 2 * 16 + 5 * 2


class TestTarget:
    """keep_within_macs against the global threshold at every sparsity."""

    random = np.random.default_rng(0)
    scores = random.standard_normal(200).astype(np.float32).round(1)  # with ties
    mask = random.random(200) < 0.8
    costs = random.choice([0.0, 1.0, 64.0, 1024.0], 200)

    @pytest.mark.parametrize("target", [500.0, 10_000.0, 30_000.0])
    def test_is_the_fullest_global_mask_within_the_target(self, target) -> None:
        found = keep_within_macs(
            self.scores, self.mask, self.costs, target, other_macs=400.0
        )
        best = -1
        for kept in range(int(self.mask.sum()) + 1):
            mask = np.asarray(keep_highest(self.scores, self.mask, kept))
            macs = 400.0 + self.costs[mask].sum()
            if macs <= target:
                best, expected, left = kept, mask, macs
        assert 0 < best < self.mask.sum()
        np.testing.assert_array_equal(found.mask, expected)
        assert found.macs == left
        assert found.nonzero == best
        assert not (found.mask & ~self.mask).any()

    def test_nothing_goes_where_the_target_is_met(self) -> None:
        before = self.costs[self.mask].sum()
        for target in (before, before + 5):
            found = keep_within_macs(self.scores, self.mask, self.costs, target)
            np.testing.assert_array_equal(found.mask, self.mask)
            assert found.macs == before

    def test_everything_goes_for_the_macs_of_other_layers(self) -> None:
        costs = self.costs + 1
        found = keep_within_macs(self.scores, self.mask, costs, 7, other_macs=7)
        assert not found.mask.any()
        assert found.macs == 7

    @pytest.mark.parametrize(
        ("target", "options", "message"),
        [
            (1e9, {}, "above the .* that the masks leave already"),
            (5.0, {"other_macs": 6.0}, "below the 6 of layers that are not prunable"),
            (10_500.0, {"tolerance": 0.1}, "cannot be met within 0.1 .*; raise"),
        ],
    )
    def test_errors(self, target, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            keep_within_macs(
                self.scores, self.mask, self.costs + 0.3, target, **options
            )

    @pytest.mark.slow
    def test_resnet20_within_a_tenth_of_a_million(self) -> None:
        model, x = build_model("resnet20"), jax.ShapeDtypeStruct((1, 32, 32, 3), float)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        params, stats = shapes["params"], shapes["batch_stats"]
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), stats)
        variables = lambda p: {"params": p, "batch_stats": ones}  # noqa: E731
        f = lambda p, x: model.apply(variables(p), x)  # noqa: E731
        costs = macs_per_weight(f, params, x)
        leaves = leaves_by_path(params)
        masks = {
            p: jnp.ones(leaves[p].shape, bool) for p in costs if p != "conv1/kernel"
        }
        order = flat_order(masks)
        found = keep_within_macs(
            np.random.default_rng(1).random(order.size),
            np.ones(order.size, bool),
            flat_costs(order, costs),
            10e6,
            other_macs=432 * 1024,
        )
        assert 10e6 - 1e5 <= found.macs <= 10e6
        masks = unflatten(order, jnp.asarray(found.mask))
        assert sparse_macs(costs, params, masks) == found.macs


def test_equal_scores_are_shared_out_over_tensors() -> None:
    cut = keep_within_macs(
        np.ones(12), np.arange(12) > 1, np.ones(12), 5.0, tolerance=1, bounds=(0, 6, 12)
    )
    np.testing.assert_array_equal(np.flatnonzero(cut.mask), [2, 3, 6, 7, 8])
