"""Projections of outputs against the Gauss-Newton matrix they estimate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.rows import projections
from woodfisher_jax.rows.projections import METRICS, directions, projected

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(1, 4)).astype(np.float32) * 2
X = RANDOM.normal(size=(200, 5)).astype(np.float32)
PARAMS = {"w": jnp.asarray(RANDOM.normal(size=(5, 3)), jnp.float32)}


def net(params, x):
    return jnp.tanh(x @ params["w"])


def moment(metric, monkeypatch) -> np.ndarray:
    """E[r rᵀ], over all 2⁴ signs there are."""
    every = np.asarray(list(itertools.product((-1.0, 1.0), repeat=4)), np.float32)
    monkeypatch.setattr(
        projections.jax.random, "rademacher", lambda *_: jnp.asarray(every)
    )
    r = directions(jax.random.key(0), np.tile(LOGITS, (16, 1)), metric)
    return np.float64(r).T @ np.float64(r) / 16


def test_the_second_moment_of_a_metric(monkeypatch) -> None:
    """That of softmax is the Hessian of the cross entropy."""
    np.testing.assert_allclose(moment("identity", monkeypatch), np.eye(4))
    p = np.exp(np.float64(LOGITS[0]))
    p /= p.sum()
    expected = np.diag(p) - np.outer(p, p)
    np.testing.assert_allclose(moment("softmax", monkeypatch), expected, atol=1e-6)
    loss = jax.jit(jax.hessian(lambda z: jax.nn.logsumexp(z) - z[1]))
    np.testing.assert_allclose(loss(LOGITS[0]), expected, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_fisher_of_projections_is_the_gauss_newton_matrix(metric) -> None:
    """Over 4,000 draws of the signs for each of ten examples."""
    x, draws = X[:10], 4000
    z = np.asarray(net(PARAMS, x), np.float64)
    jacobian = np.asarray(jax.jit(jax.jacrev(net))(PARAMS, x)["w"]).reshape(10, 3, 15)
    expected = np.zeros((15, 15))
    for j, logits in zip(np.float64(jacobian), z, strict=True):
        p = np.exp(logits) / np.exp(logits).sum()
        m = np.eye(3) if metric == "identity" else np.diag(p) - np.outer(p, p)
        expected += j.T @ m @ j / 10
    r = directions(jax.random.key(1), jnp.tile(z, (draws, 1)), metric)
    batch = {"inputs": jnp.tile(x, (draws, 1))[:, None], "direction": r[:, None]}
    gradient = jax.jit(jax.vmap(jax.grad(projected(net)), in_axes=(None, 0)))
    rows = np.asarray(gradient(PARAMS, batch)["w"], np.float64).reshape(-1, 15)
    found = rows.T @ rows / len(rows)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.slow
def test_a_method_takes_them_as_its_loss() -> None:
    assert projected(net) is projected(net)  # nothing is compiled again
    key = jax.random.key(0)
    samples = {"inputs": X, "direction": directions(key, net(PARAMS, X), "identity")}
    _, masks, info = wf.prune(
        projected(net), PARAMS, samples, sparsity=0.4, method="kfac"
    )
    assert info.nonzero == 9
    assert set(masks) == {"w"}


def test_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match=r"metric='l2'; expected one of \['identity'"):
        directions(jax.random.key(0), LOGITS, "l2")
