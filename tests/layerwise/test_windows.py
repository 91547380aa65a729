"""Weights fitted together."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.layerwise import windows


def net(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Two convolutions whose channels come first, and a sum over positions."""
    for name in "ab":
        images = jax.nn.relu(jax.lax.conv(images, params[name], (1, 1), "SAME"))
    return images.sum((2, 3))


def test_repair_of_convolutions_is_that_of_jaxs_own_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((6, 3, 3, 3), np.float32),
        "b": rng.standard_normal((4, 6, 3, 3), np.float32),
    }
    images = rng.standard_normal((8, 3, 8, 8), np.float32)
    entered = []

    @contextlib.contextmanager
    def watched():
        entered.append(True)
        with fast():
            yield

    def pruned() -> dict[str, jax.Array]:
        return wf.prune_layerwise(
            net, params, images, sparsity=0.5, repair=4, batch_size=4, progress=False
        )[0]

    fast = windows.fast_weight_gradients
    monkeypatch.setattr(windows, "fast_weight_gradients", watched)
    found = pruned()
    assert entered
    monkeypatch.setattr(windows, "fast_weight_gradients", contextlib.nullcontext)
    expected = pruned()
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # Repair does something, so that what it does can differ.
    bare = wf.prune_layerwise(
        net, params, images, sparsity=0.5, batch_size=4, progress=False
    )[0]
    assert float(jnp.max(jnp.abs(bare["b"] - expected["b"]))) > 1e-3
