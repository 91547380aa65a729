import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from woodfisher_jax.tracing.layers import (
    Bias,
    Convolution,
    Dot,
    Other,
    Product,
    find_uses,
    view_entries,
)
from woodfisher_jax.trees.paths import leaves_by_path

X = jnp.ones((5, 3))
W = jnp.ones((3, 4))
B = jnp.ones(4)


def kinds(f, params, batch=X) -> dict[str, list]:
    """For each parameter the uses in short."""

    def short(use):
        if isinstance(use, Other):
            return (use.primitive, use.hides_product)
        return type(use).__name__

    return {p: [short(u) for u in us] for p, us in find_uses(f, params, batch).items()}


class TestDense:
    def test_product_and_bias(self) -> None:
        uses = find_uses(lambda p, x: x @ p["w"] + p["b"], {"w": W, "b": B}, X)
        (product,), (bias,) = uses["w"], uses["b"]
        assert isinstance(product, Product)
        assert product.geometry == Dot(((1,), (0,)), ((), ()))
        assert product.side == 1
        assert product.operands == ((5, 3), (3, 4))
        assert product.output.shape == (5, 4)
        assert product.views == ()
        assert isinstance(bias, Bias)
        assert bias.position == product.position
        np.testing.assert_array_equal(bias.entries, range(4))

    def test_shapes_are_enough(self) -> None:
        params = {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
        batch = jax.ShapeDtypeStruct((5, 3), jnp.float32)
        assert kinds(lambda p, x: x @ p["w"], params, batch) == {"w": ["Product"]}

    @pytest.mark.parametrize(
        "f",
        [
            lambda p, x: jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(p["w"], x),
            lambda p, x: jax.checkpoint(lambda w, x: jnp.sin(x) @ w)(p["w"], x),
            lambda p, x: jnp.einsum("io,bi->ob", p["w"], x),
            lambda p, x: jax.vmap(lambda x: p["w"].T @ x)(x),
            lambda p, x: x @ p["w"].T.reshape(2, 2, 3).transpose(2, 0, 1).reshape(3, 4),
            lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
            lambda p, x: x @ p["w"][::-1],
            lambda p, x: jnp.einsum(
                "bi,bio->bo", x, jnp.broadcast_to(p["w"], (5, 3, 4))
            ),
        ],
        ids=["jit", "remat", "einsum", "vmap", "reshape", "cast", "flip", "broadcast"],
    )
    def test_ways_to_the_product(self, f) -> None:
        assert kinds(f, {"w": W}) == {"w": ["Product"]}

    def test_a_bias_is_found_behind_transposes_and_casts(self) -> None:
        def f(p, x):
            one = lambda x: (p["w"] @ x).astype(jnp.bfloat16) + p["b"]  # noqa: E731
            return jax.vmap(one)(x)

        params = {"w": jnp.ones((4, 3)), "b": B.astype(jnp.bfloat16)}
        assert kinds(f, params) == {"w": ["Product"], "b": ["Bias"]}

    def test_bias_entries_follow_the_outputs_of_the_weight(self) -> None:
        def f(p, x):
            y = jnp.einsum("bi,iho->boh", x, p["w"])
            return y + p["b"].T

        params = {"w": jnp.ones((3, 2, 4)), "b": jnp.ones((2, 4))}
        uses = find_uses(f, params, X)
        (bias,) = uses["b"]
        # Whatever order einsum chose for the outputs, the bias [h, o] is read along.
        (product,) = uses["w"]
        assert isinstance(bias, Bias)
        assert product.views == ()
        np.testing.assert_array_equal(bias.entries, range(8))


def test_what_is_subtracted_from_a_layer_is_known_as_a_bias_with_a_minus() -> None:
    def f(p, x):
        return x @ p["w"] - p["b"]

    (use,) = find_uses(f, {"w": W, "b": B}, X)["b"]
    (product,) = find_uses(f, {"w": W, "b": B}, X)["w"]
    assert isinstance(use, Other)
    assert (use.primitive, use.hides_product) == ("sub", False)
    assert isinstance(use.subtracted, Bias)
    assert use.subtracted.position == product.position
    (use,) = find_uses(lambda p, x: jnp.sin(x) - p["b"], {"b": jnp.ones(3)}, X)["b"]
    assert use.subtracted is None


def test_a_slice_of_a_tensor_is_a_layer() -> None:
    (use,) = find_uses(lambda p, x: x @ p["w"][:, 1:3], {"w": W}, X)["w"]
    assert isinstance(use, Product)
    assert view_entries((3, 4), use.views).tolist() == [[1, 2], [5, 6], [9, 10]]


class TestCustomRules:
    def test_are_entered_and_named(self) -> None:
        @jax.custom_vjp
        def dense(x, w):
            return x @ w

        dense.defvjp(
            lambda x, w: (x @ w, (x, w)), lambda r, t: (t @ r[1].T, r[0].T @ t)
        )
        (use,) = find_uses(lambda p, x: dense(x, p["w"]), {"w": W}, X)["w"]
        assert isinstance(use, Product)
        assert use.rule == "custom_vjp_call"


class TestUnresolved:
    @pytest.mark.parametrize(
        ("f", "expected"),
        [
            (lambda p, x: x, []),
            (lambda p, x: x @ p["w"] + x @ p["w"], ["Product", "Product"]),
            (lambda p, x: x @ (2 * p["w"]), [("mul", True)]),
            (lambda p, x: x @ (p["w"] @ p["w"].T), [("dot_general", True)]),
            (lambda p, x: p["w"][x[:, 0].astype(int)], [("gather", False)]),
            (
                lambda p, x: jnp.sum(x @ p["w"]) + jnp.sum(p["w"] ** 2),
                ["Product", ("add", False)],
            ),
            (
                lambda p, x: jax.lax.scan(
                    lambda h, _: (h @ p["w"] @ p["w"].T, None), x, length=2
                )[0],
                [("scan", True)],
            ),
            (
                lambda p, x: jax.lax.cond(
                    x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x @ p["w"], x
                ),
                [("cond", True)],
            ),
            (
                lambda p, x: jax.lax.fori_loop(
                    0, 3, lambda _, h: h + jnp.mean(p["w"]), x
                ),
                [("scan", False)],
            ),
        ],
        ids=[
            "unused",
            "twice",
            "scaled",
            "low rank",
            "lookup",
            "weight decay",
            "scan",
            "cond",
            "loop without products",
        ],
    )
    def test_is_named(self, f, expected) -> None:
        assert kinds(f, {"w": W})["w"] == expected

    def test_the_reason_is_a_phrase(self) -> None:
        (use,) = find_uses(lambda p, x: x @ (2 * p["w"]), {"w": W}, X)["w"]
        assert use.reason == "enters a product with activations inside or after 'mul'"
        (use,) = find_uses(lambda p, x: x * p["b"][:3], {"b": B}, X)["b"]
        assert use.reason == "meets activations in 'mul'"

    def test_what_is_added_to_no_layer_is_no_bias(self) -> None:
        params = {"w": W, "b": B, "c": jnp.ones((5, 1)), "d": jnp.ones(())}

        def f(p, x):
            y = jnp.tanh(x @ p["w"]) + p["b"]
            z = x @ p["w"] + p["c"]
            return y + z + (x @ p["w"] + p["d"])

        found = kinds(f, params)
        assert found["b"] == found["c"] == found["d"] == [("add", False)]

    def test_a_bias_is_the_same_at_every_position(self) -> None:
        def f(p, x):
            rows = jnp.broadcast_to(p["b"][:, None], (2, 3)).reshape(3, 2).T
            rows = rows.reshape(3, 2).T.reshape(3, 2)  # b0 b1, b1 b0, b0 b1
            return x @ p["w"] + rows

        params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
        assert kinds(f, params, jnp.ones((3, 3)))["b"] == [("add", False)]

    def test_a_bias_of_copies_is_none_of_the_layer(self) -> None:
        def f(p, x):
            return jnp.broadcast_to(x @ p["w"], (4, 4)) + p["b"]

        params = {"w": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}
        assert kinds(f, params, jnp.ones((1, 3)))["b"] == [("add", False)]

    def test_activations_times_activations_are_nobody_s(self) -> None:
        def f(p, x):
            y = x @ p["w"]
            return y @ y.T

        assert kinds(f, {"w": W}) == {"w": ["Product"]}


class TestConvolution:
    def test_settings(self) -> None:
        model = nn.Conv(6, (3, 2), strides=2, padding=1, feature_group_count=2)
        x = jnp.ones((2, 7, 8, 4))
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        uses = find_uses(lambda p, x: model.apply({"params": p}, x), params, x)
        (product,), (bias,) = uses["kernel"], uses["bias"]
        assert isinstance(product.geometry, Convolution)
        assert product.geometry.groups == 2
        assert product.geometry.strides == (2, 2)
        assert product.geometry.padding == ((1, 1), (1, 1))
        assert product.output.shape == (2, 4, 5, 6)
        assert isinstance(bias, Bias)
        np.testing.assert_array_equal(bias.entries, range(6))

    def test_a_bias_is_found_behind_reshapes(self) -> None:
        def one(p, x):
            return jax.lax.conv(x[None], p["w"], (1, 1), "SAME") + p["b"]

        params = {"w": jnp.ones((4, 2, 3, 3)), "b": jnp.ones((4, 1, 1))}
        f = lambda p, x: jax.vmap(one, (None, 0))(p, x)  # noqa: E731
        uses = find_uses(f, params, jnp.ones((3, 2, 4, 4)))
        (bias,) = uses["b"]
        assert isinstance(bias, Bias)
        np.testing.assert_array_equal(bias.entries, range(4))

    def test_a_kernel_as_image_is_not_a_layer(self) -> None:
        def f(p, x):
            return jax.lax.conv(p["w"], x, (1, 1), "SAME")

        batch = jnp.ones((2, 1, 3, 3))
        assert kinds(f, {"w": jnp.ones((1, 1, 8, 8))}, batch) == {
            "w": [("conv_general_dilated", True)]
        }


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        x = nn.remat(nn.Dense)(6)(x.reshape(len(x), -1))
        return nn.Dense(2)(nn.gelu(nn.LayerNorm()(x)))


class TestFrameworks:
    def test_linen(self) -> None:
        x = jnp.ones((2, 4, 4, 1))
        params = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
        stats = {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}

        def f(params, x):
            return Net().apply({"params": params, "batch_stats": stats}, x)

        found = kinds(f, params, x)
        assert found["BatchNorm_0/scale"] == [("mul", False)]
        layers = {path for path, uses in found.items() if uses == ["Product"]}
        biases = {path for path, uses in found.items() if uses == ["Bias"]}
        names = ("Conv_0", "CheckpointDense_0", "Dense_0")
        assert layers == {f"{name}/kernel" for name in names}
        assert biases == {f"{name}/bias" for name in names}

    def test_nnx(self) -> None:
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
                self.out = nnx.Linear(64, 2, rngs=rngs)

            def __call__(self, x):
                return self.out(nnx.relu(self.conv(x)).reshape(len(x), -1))

        graph, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
        found = kinds(
            lambda s, x: nnx.merge(graph, s)(x), state, jnp.ones((2, 4, 4, 1))
        )
        assert set(found) == set(leaves_by_path(state))
        for path, uses in found.items():
            assert uses == (["Product"] if "kernel" in path else ["Bias"]), path

    def test_attention(self) -> None:
        model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
        x = jnp.ones((2, 5, 4))
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        found = kinds(lambda p, x: model.apply({"params": p}, x), params, x)
        for path, uses in found.items():
            assert uses == (["Product"] if "kernel" in path else ["Bias"]), path


def test_view_entries() -> None:
    tensor = np.random.default_rng(0).standard_normal((2, 3, 4))
    views = [
        ("transpose", (2, 0, 1)),
        ("reshape", (4, 6)),
        ("flip", (1,)),
        ("slice", (0, 1), (4, 6), (2, 1)),
        ("broadcast", (2, 2, 5), (1, 2)),
    ]
    expected = np.broadcast_to(
        tensor.transpose(2, 0, 1).reshape(4, 6)[::2, ::-1][:, 1:], (2, 2, 5)
    )
    np.testing.assert_array_equal(
        tensor.reshape(-1)[view_entries(tensor.shape, views)], expected
    )
