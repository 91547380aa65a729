"""Which structures go, by magnitude and by a Fisher that is inverted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf

DAMPING = 1e-2
HEADS, VALUES, WIDTH = 4, 3, 5
ATTENTION = {
    **{name: normal(n, WIDTH, HEADS, VALUES) for n, name in enumerate("qkv")},
    "out": normal(3, HEADS, VALUES, 2),
}
TOKENS = np.asarray(normal(4, 12, 6, WIDTH))
PARAMS = {"a": normal(5, 3, 4), "b": normal(6, 4, 5), "c": normal(7, 5, 2)}
X = np.asarray(normal(8, 40, 3))


def attention(params, x):
    """Values have an axis of their own, which lies across all heads."""
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in "qkv")
    shares = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    mixed = jnp.einsum("bhts,bshe->bthe", shares, v)
    return jnp.einsum("bthe,heo->bto", mixed, params["out"]).mean(1)


def net(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


def loss(params, x):
    return jnp.mean((net(params, x) - 1) ** 2)


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (lambda out: out.at[2].multiply(1e-3), {"q": (1, 2), "out": (0, 2)}),
        # Values that are small do as little as what reads them.
        (lambda out: out, {"v": (2, 1), "out": (1, 1)}),
    ],
    ids=["head", "dimension of values"],
)
def test_a_weight_that_two_structures_read_tells_of_the_larger(change, gone) -> None:
    params = {**ATTENTION, "out": change(ATTENTION["out"])}
    if "v" in gone:
        params["v"] = params["v"].at[:, :, 1].multiply(1e-3)
    found = wf.structures(attention, params, TOKENS)
    assert [(f.kind, len(f.units)) for f in found.families] == [
        ("heads", HEADS),
        ("neurons", VALUES),
    ]

    def loss_of(params, x):
        return jnp.mean((attention(params, x) - 1) ** 2)

    _, masks, _ = wf.prune(
        loss_of, params, TOKENS, sparsity=0.05, pattern=found, method="diagfisher"
    )
    expected = {path: np.ones(leaf.shape, bool) for path, leaf in params.items()}
    taken = ("q", "k", "v") if "q" in gone else ("v",)
    for path in taken:
        axis, number = gone[taken[0]]
        np.moveaxis(expected[path], axis, 0)[number] = False
    axis, number = gone["out"]
    np.moveaxis(expected["out"], axis, 0)[number] = False
    assert all(np.array_equal(masks[path], expected[path]) for path in expected)


def test_the_sum_of_saliencies_is_of_what_reads_the_structures_that_go() -> None:
    _, masks, info = wf.prune(
        loss,
        PARAMS,
        X,
        sparsity=0.3,
        pattern="structures",
        damping=DAMPING,
        update="joint",
    )
    gradients = jax.vmap(lambda one: jax.grad(loss)(PARAMS, one[None]))(X)
    total = 0.0
    for path in ("b", "c"):
        G, w = (
            np.asarray(a[path], np.float64).reshape(shape)
            for a, shape in ((gradients, (len(X), -1)), (PARAMS, -1))
        )
        inverse = np.linalg.inv(DAMPING * np.eye(len(w)) + G.T @ G / len(X))
        rows = np.arange(len(w)).reshape(PARAMS[path].shape)
        for Q in rows[~np.asarray(masks[path]).any(1)]:
            total += w[Q] @ np.linalg.solve(inverse[np.ix_(Q, Q)], w[Q]) / 2
    assert total > 0
    assert info.saliency_sum == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"sparsity": 0.99}, r"leaves 0 of 42 .* expected at most 0.8571 \(6 weights"),
        ({"sparsity": 0.9}, r"leaves 4 of 42 .* expected at most 0.8571 \(6 weights"),
        ({"flops_target": 5e-6}, r"flops_target=5e-06 .* expected more than 6e-06,"),
    ],
)
def test_a_goal_that_structures_cannot_meet_is_refused_first(goal, message) -> None:
    started: list[str] = []

    def progress(label: str, done: int, total: int) -> None:
        started.append(label)

    with pytest.raises(ValueError, match=message):
        wf.prune(loss, PARAMS, X, pattern="structures", progress=progress, **goal)
    assert not started


def test_structures_beyond_the_goal_already_are_no_error() -> None:
    options = {"pattern": "structures", "method": "globalmagni"}
    params, masks, first = wf.prune(loss, PARAMS, X, sparsity=0.41, **options)
    assert first.sparsity > 0.41
    between = (0.41 + first.sparsity) / 2
    _, _, again = wf.prune(loss, params, X, sparsity=between, masks=masks, **options)
    assert again.sparsity == first.sparsity


def test_the_largest_sparsity_of_the_message_is_reached() -> None:
    options = {"pattern": "structures", "method": "globalmagni"}
    _, _, info = wf.prune(loss, PARAMS, X, sparsity=0.8571, **options)
    assert info.nonzero == 6


@pytest.mark.parametrize("call", [wf.prune, wf.prune_layerwise])
def test_structures_of_another_network_are_refused(call) -> None:
    wider = {**PARAMS, "b": jnp.ones((4, 6)), "c": jnp.ones((6, 2))}
    found = wf.structures(net, wider, X)
    f = loss if call is wf.prune else net
    with pytest.raises(ValueError, match=r"whose 'b' has shape \(4, 6\); in params"):
        call(f, PARAMS, X, sparsity=0.5, pattern=found)


def test_what_was_given_and_has_none_is_named() -> None:
    found = wf.structures(net, PARAMS, X).of(["heads"])
    with pytest.raises(ValueError, match=r"pattern='Structures\(number=0, .* has none"):
        wf.prune(loss, PARAMS, X, sparsity=0.5, pattern=found)
