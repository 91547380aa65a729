"""Multiply-accumulates of each weight, against XLA and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from woodfisher_jax.models import build_model
from woodfisher_jax.tracing.macs import (
    dense_macs,
    flat_costs,
    macs_per_weight,
    macs_table,
    sparse_macs,
)
from woodfisher_jax.trees.blocks import flat_order, flatten


def abstract(model: nn.Module, *shape: int):
    """A model's function, the shapes of its parameters, and of a batch."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    stats = jax.tree.map(
        lambda s: jnp.ones(s.shape),
        {k: v for k, v in variables.items() if k != "params"},
    )
    return lambda p, x: model.apply({"params": p, **stats}, x), variables["params"], x


def costs_of(model: nn.Module, *shape: int) -> dict[str, float]:
    return macs_per_weight(*abstract(model, *shape))


class TestPerWeight:
    @pytest.mark.parametrize(
        ("model", "shape", "expected"),
        [
            (nn.Dense(4), (5, 3), 1),
            (nn.Dense(4), (5, 7, 3), 7),
            (nn.Conv(4, (3, 3)), (2, 8, 8, 3), 64),
            (nn.Conv(4, (3, 3), strides=2), (2, 8, 8, 3), 16),
            (nn.Conv(4, (3, 3), padding="VALID"), (2, 8, 9, 3), 42),
            (nn.Conv(6, (3, 3), feature_group_count=3), (2, 8, 8, 3), 64),
            (nn.Conv(4, (3,), strides=3), (1, 9, 2), 3),
            (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (2, 8, 8, 3), 64),
        ],
        ids=["dense", "positions", "same", "strided", "valid", "depthwise", "1d", "up"],
    )
    def test_is_the_number_of_positions(self, model, shape, expected) -> None:
        assert costs_of(model, *shape) == {"kernel": expected}

    @pytest.mark.parametrize(
        "model",
        [
            nn.Conv(4, (3, 2), padding="VALID", strides=2, use_bias=False),
            nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3, use_bias=False),
            nn.DenseGeneral((2, 5), axis=(-2, -1), use_bias=False),
        ],
    )
    def test_xla_counts_the_same(self, model) -> None:
        f, params, x = abstract(model, 2, 9, 8, 3)
        counted = jax.jit(f).lower(params, x).cost_analysis()["flops"]
        costs = macs_per_weight(f, params, x)
        # Two operations each, for two examples.
        assert counted == 2 * 2 * dense_macs(costs, params) > 0

    def test_a_shared_tensor_costs_the_sum(self) -> None:
        params = {"w": jnp.ones((3, 3))}
        x = jnp.ones((5, 7, 3))
        f = lambda p, x: jnp.mean(x @ p["w"], 1) @ p["w"]  # noqa: E731
        assert macs_per_weight(f, params, x) == {"w": 8}

    def test_a_broadcast_tensor_costs_each_of_its_copies(self) -> None:
        params = {"w": jnp.ones((3, 1))}
        f = lambda p, x: x @ jnp.broadcast_to(p["w"], (3, 4))  # noqa: E731
        assert macs_per_weight(f, params, jnp.ones((5, 3))) == {"w": 4}

    def test_what_only_meets_activations_otherwise_is_free(self) -> None:
        f, params, x = abstract(nn.Dense(4), 5, 3)
        paths = ["bias", "kernel"]
        assert macs_per_weight(f, params, x, paths) == {"bias": 0, "kernel": 1}

    def test_a_weight_in_a_scan_costs_every_round(self) -> None:
        params = {"w": jnp.ones((3, 3)), "stack": jnp.ones((4, 3, 3))}

        def f(p, x):
            h, _ = jax.lax.scan(lambda h, w: (h @ w, None), x, p["stack"])
            return jax.lax.scan(lambda h, _: (h @ p["w"], None), h, length=2)[0]

        costs = macs_per_weight(f, params, jnp.ones((5, 3)))
        assert costs == {"stack": 1, "w": 2}

    def test_what_cannot_be_counted_is_refused(self) -> None:
        params = {"w": jnp.ones((3, 3)), "v": jnp.ones((3, 3))}

        def f(p, x):
            again = lambda h: jnp.tanh(h @ p["w"])  # noqa: E731
            return jax.lax.while_loop(lambda h: h.sum() > 1, again, x @ p["v"])

        x = jnp.ones((5, 3))
        with pytest.raises(ValueError, match=r"'w' cannot be counted.*loop"):
            macs_per_weight(f, params, x)
        assert macs_per_weight(f, params, x, ["v"]) == {"v": 1}

    def test_an_unknown_path_is_named(self) -> None:
        f, params, x = abstract(nn.Dense(4), 5, 3)
        with pytest.raises(ValueError, match=r"paths names 'weight'.*kernel"):
            macs_per_weight(f, params, x, ["weight"])


class TestNetworks:
    """Published numbers of multiply-accumulates, in millions."""

    @pytest.mark.parametrize(
        ("name", "side", "millions", "tolerance"),
        [
            ("resnet20", 32, 40.6, 0.01),
            pytest.param("resnet50", 224, 4_090, 0.001, marks=pytest.mark.slow),
            ("mobilenet_v1", 224, 569, 0.001),
        ],
    )
    def test_dense(self, name, side, millions, tolerance) -> None:
        f, params, x = abstract(build_model(name), 1, side, side, 3)
        costs = macs_per_weight(f, params, x)
        assert dense_macs(costs, params) == pytest.approx(millions * 1e6, rel=tolerance)

    def test_every_kernel_of_resnet20(self) -> None:
        f, params, x = abstract(build_model("resnet20"), 1, 32, 32, 3)
        rows = {
            row.path: row for row in macs_table(macs_per_weight(f, params, x), params)
        }
        assert len(rows) == 22  # 19 convolutions, 2 shortcuts, 1 classifier
        assert rows["conv1/kernel"].per_weight == 1024
        assert rows["conv1/kernel"].dense == 432 * 1024
        assert rows["layer3/block2/conv2/kernel"].per_weight == 64
        assert rows["fc/kernel"].dense == 640


def test_layers_are_in_the_order_of_the_program() -> None:
    params = {name: jnp.ones((3, 3)) for name in ("a2", "a10", "head", "stem")}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        for name in ("stem", "a2", "a10", "a2", "head"):
            x = jax.jit(jnp.tanh)(x @ params[name])
        return x

    costs = macs_per_weight(apply, params, jnp.ones((1, 3)))
    assert list(costs.items()) == [("stem", 1), ("a2", 2), ("a10", 1), ("head", 1)]


def test_table_under_masks() -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2)), "c": jnp.ones(4)}
    costs = {"a": 10.0, "b": 1.0}
    masks = {"a": jnp.asarray([[True, False, True], [False, False, False]])}
    table = macs_table(costs, params, masks)
    assert table[0] == ("a", 6, 2, 10.0, 60.0, 20.0)
    assert table[1] == ("b", 4, 4, 1.0, 4.0, 4.0)
    assert dense_macs(costs, params) == 64
    assert sparse_macs(costs, params, masks) == 24
    assert sparse_macs(costs, params, {}) == 64


def test_flat_costs_follow_the_flat_order() -> None:
    tensors = {"x/kernel": jnp.ones((3, 2)), "y": jnp.ones(4)}
    costs = {"y": 5.0, "x/kernel": 7.0}
    order = flat_order(tensors)
    expected = flatten(
        order, {p: jnp.full(t.shape, costs[p]) for p, t in tensors.items()}
    )
    np.testing.assert_array_equal(flat_costs(order, costs), expected)
