"""Masks that depend on what weights cost, against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from woodfisher_jax import METHODS, prune
from woodfisher_jax.pruning.paths import leaves_by_path

RANDOM = np.random.default_rng(0)


class Net(nn.Module):
    """A convolution whose weights cost 16 MACs each, and a dense layer, 1 each."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="conv")(images))
        return nn.Dense(3, name="fc")(jnp.mean(x, axis=(1, 2)))


NET = Net()
IMAGES = RANDOM.standard_normal((20, 6, 6, 2)).astype(np.float32)
LABELS = RANDOM.integers(0, 3, 20)
PARAMS = NET.init(jax.random.key(0), IMAGES)["params"]
PATHS = ("conv/kernel", "fc/kernel")
COSTS = {"conv/kernel": 16.0, "fc/kernel": 1.0}
DENSE_MACS = 72 * 16 + 12


def loss_fn(params, batch):
    logs = jax.nn.log_softmax(NET.apply({"params": params}, batch[0]))
    return -jnp.mean(jnp.take_along_axis(logs, batch[1][:, None], 1))


def run(loss=loss_fn, **options):
    if options.get("method") not in ("diagfisher", "naivehess"):
        options.setdefault("damping", 1e-3)
    return prune(loss, PARAMS, (IMAGES, LABELS), **options)


def scores_of(method: str) -> dict[str, np.ndarray]:
    """The statistic, from gradients in float64."""
    leaves = {p: np.float64(leaves_by_path(PARAMS)[p]) for p in PATHS}
    if method == "globalmagni":
        return {p: np.abs(w) for p, w in leaves.items()}
    one = lambda p, x, y: loss_fn(p, (x[None], y[None]))  # noqa: E731
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), PARAMS)
        rows = leaves_by_path(
            jax.vmap(jax.grad(one), (None, 0, 0))(wide, np.float64(IMAGES), LABELS)
        )
    found = {}
    for path, w in leaves.items():
        g = np.asarray(rows[path]).reshape(20, -1)
        inverse = np.linalg.inv(g.T @ g / 20 + 1e-3 * np.eye(w.size))
        found[path] = w**2 / (2 * np.diag(inverse).reshape(w.shape))
    return found


def highest(scores: dict[str, np.ndarray], kept: int) -> dict[str, np.ndarray]:
    joined = np.concatenate([scores[p].reshape(-1) for p in PATHS])
    least = np.sort(joined)[-kept]
    return {p: scores[p] >= least for p in PATHS}


def assert_masks(masks, expected) -> None:
    for path in PATHS:
        np.testing.assert_array_equal(masks[path], expected[path])


@pytest.mark.parametrize("method", ["globalmagni", "woodfisherblock_flops"])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_scores_are_divided_by_a_power_of_what_layers_cost(
    method, per_parameter
) -> None:
    _, masks, _ = run(
        sparsity=0.5,
        method=method,
        flops_power=0.5,
        flops_per_parameter=per_parameter,
    )
    scores = scores_of(method)
    for path in PATHS:
        macs = COSTS[path] * (1 if per_parameter else scores[path].size)
        scores[path] = scores[path] / macs**0.5
    assert_masks(masks, highest(scores, 42))


def test_the_logarithm_of_macs() -> None:
    found = run(
        sparsity=0.5, method="globalmagni", flops_power=2.0, flops_normalize="log"
    )
    scores = scores_of("globalmagni")
    for path in PATHS:
        scores[path] /= np.log2(COSTS[path] * scores[path].size) ** 2
    assert_masks(found[1], highest(scores, 42))


@pytest.mark.parametrize("method", ["globalmagni", "woodfisherblock_flops"])
def test_a_target_in_macs_keeps_the_highest_scores_that_fit(method) -> None:
    target = 600e-6
    params, masks, info = run(flops_target=target, method=method)
    scores = scores_of(method)
    counts = [
        sum(COSTS[p] * mask.sum() for p, mask in highest(scores, kept).items())
        for kept in range(1, 85)
    ]
    kept = int(np.searchsorted(counts, 600, side="right"))
    assert_masks(masks, highest(scores, kept))
    assert info.macs == counts[kept - 1]
    assert 600 - 16 < info.macs <= 600
    # One update, of a mask that a sparsity gives as well.
    same = run(sparsity=1 - kept / 84, method=method)
    for path in PATHS:
        np.testing.assert_array_equal(
            leaves_by_path(params)[path], leaves_by_path(same[0])[path]
        )


def test_layers_that_are_not_prunable_count() -> None:
    info = run(flops_target=1160e-6, method="globalmagni", prunable="fc/kernel")[2]
    assert info.macs == 72 * 16 + 8
    assert info.nonzero == 8


def test_masks_are_nested_over_targets_and_recomputations() -> None:
    params, masks = PARAMS, None
    for target in (900e-6, 500e-6):
        params, new, info = prune(
            loss_fn,
            params,
            (IMAGES, LABELS),
            flops_target=target,
            masks=masks,
            method="woodfisherblock_flops",
            recompute=1,
            flops_power=0.3,
        )
        assert target * 1e6 - 16 < info.macs <= target * 1e6
        if masks is not None:
            assert not any((new[p] & ~masks[p]).any() for p in PATHS)
        masks = new


@pytest.mark.parametrize(
    "method", [n for n, row in METHODS.items() if "global" in row.scopes]
)
def test_every_method_that_ranks_globally_takes_a_target(method) -> None:
    info = run(flops_target=600e-6, method=method)[2]
    assert 600 - 16 < info.macs <= 600


def test_errors() -> None:
    with pytest.raises(ValueError, match="loss_fn=None with flops_power"):
        run(loss=None, sparsity=0.5, method="globalmagni", flops_power=1.0)
    with pytest.raises(ValueError, match="samples is missing; expected at least one"):
        prune(loss_fn, PARAMS, sparsity=0.5, method="globalmagni", flops_power=1.0)
    with pytest.raises(ValueError, match="below the 1152 of layers that are not"):
        run(flops_target=1e-5, method="globalmagni", prunable="fc/kernel")
    _, masks, info = run(flops_target=600e-6, method="globalmagni")
    with pytest.raises(ValueError, match=f"above the {info.macs:g}"):
        run(flops_target=1.0, method="globalmagni", masks=masks)


def test_zeros_of_another_pruner_cost_nothing() -> None:
    params, masks, _ = run(sparsity=0.5, method="globalmagni", prunable="conv/kernel")
    left = 16 * int(masks["conv/kernel"].sum())
    info = prune(
        loss_fn,
        params,
        (IMAGES, LABELS),
        flops_target=(left + 5) * 1e-6,
        method="globalmagni",
        prunable="fc/kernel",
    )[2]
    assert info.macs == left + 5
