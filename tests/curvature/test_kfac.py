"""Kronecker factors of layers against gradients and dense products, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.tree_util import Partial

from woodfisher_jax.curvature.kfac import kfac_factors, passes
from woodfisher_jax.equations.kronecker import Factor, damped, diagonal, inverse
from woodfisher_jax.rows.gradients import as_partial
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.trees.blocks import flat_order
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.trees.prunable import init_masks

RANDOM = np.random.default_rng(0)
EVERYTHING = lambda path, leaf: True  # noqa: E731


def array(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def damped_inverse(factors, damping: float, pi: bool = False):
    return inverse(damped(factors, damping, pi=pi))


def factors_of(loss_fn, params, samples, prunable=None, **options):
    masks = init_masks(params, prunable)
    if "num_samples" not in options:
        options["num_samples"] = len(jax.tree.leaves(samples)[0])
    return kfac_factors(loss_fn, params, masks, samples, **options)


def flat_positions(factor: Factor, order: list[str]) -> np.ndarray:
    """Where the entries of a factor, row by row, are in all tensors joined."""
    starts = dict(
        zip(
            order,
            np.cumsum([0, *(np.prod(factor.shapes[p]) for p in order)]).tolist(),
            strict=False,
        )
    )
    columns = [entries + starts[p] for p, entries in factor.entries.items()]
    return np.concatenate(columns, axis=-1)


def dense_fisher(loss_fn, params, samples, paths) -> np.ndarray:
    """(1/n) Σ g gᵀ over the tensors joined, in float64."""
    one = lambda p, x: loss_fn(p, jax.tree.map(lambda a: a[None], x))  # noqa: E731
    found = leaves_by_path(jax.vmap(jax.grad(one), (None, 0))(params, samples))
    rows = [np.asarray(found[p], np.float64).reshape(len(found[p]), -1) for p in paths]
    rows = np.concatenate(rows, axis=1)
    return rows.T @ rows / len(rows)


def assert_block(factor: Factor, fisher: np.ndarray, order: list[str]) -> None:
    """The Fisher of the layer is the Kronecker product of its factors."""
    (entries,) = flat_positions(factor, order)
    (inputs,), (outputs,) = factor.inputs, factor.outputs
    block = fisher[np.ix_(entries.reshape(-1), entries.reshape(-1))]
    np.testing.assert_allclose(
        np.kron(outputs, inputs), block, rtol=1e-4, atol=1e-5 * np.abs(block).max()
    )


class TestFactors:
    def test_one_layer_and_one_sample_are_exact(self) -> None:
        params = {"kernel": array(4, 3), "bias": array(3)}

        def loss(p, x):
            return jnp.sum(jnp.sin(x @ p["kernel"] + p["bias"]))

        x = array(1, 4)
        (factor,) = factors_of(loss, params, x, EVERYTHING).values()
        paths = ["bias", "kernel"]
        assert list(factor.entries) == ["kernel", "bias"]
        assert_block(factor, dense_fisher(loss, params, x, paths), paths)

    def test_formula_for_two_layers(self) -> None:
        params = {"w1": array(5, 4), "w2": array(4, 3)}
        x = array(7, 5)

        def loss(p, x):
            return jnp.mean(jnp.sum((jnp.tanh(x @ p["w1"]) @ p["w2"]) ** 2, axis=1))

        found = factors_of(loss, params, x)
        hidden = np.tanh(np.float64(x) @ params["w1"])
        g2 = 2 * hidden @ params["w2"]
        g1 = (g2 @ params["w2"].T) * (1 - hidden**2)
        for path, a, g in (("w1", x, g1), ("w2", hidden, g2)):
            np.testing.assert_allclose(found[path].inputs[0], a.T @ a / 7, rtol=1e-5)
            np.testing.assert_allclose(
                found[path].outputs[0], g.T @ g / 7, rtol=1e-4, atol=1e-5
            )

    def test_formula_for_a_grouped_convolution(self) -> None:
        model = nn.Conv(6, (2, 2), strides=2, padding="VALID", feature_group_count=2)
        params = {"kernel": array(2, 2, 2, 6), "bias": array(6)}
        x = array(3, 4, 6, 4)

        def loss(p, x):
            return jnp.mean(jnp.sum(model.apply({"params": p}, x) ** 2, (1, 2, 3)))

        (factor,) = factors_of(loss, params, x, EVERYTHING).values()
        positions = list(itertools.product(range(2), range(3)))
        for group in range(2):
            inputs, outputs = np.zeros((9, 9)), np.zeros((3, 3))
            kernel = np.float64(params["kernel"][..., 3 * group : 3 * group + 3])
            bias = params["bias"][3 * group : 3 * group + 3]
            for image, (i, j) in itertools.product(np.float64(x), positions):
                part = image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                patch = part[..., 2 * group : 2 * group + 2]
                g = 2 * (np.einsum("abc,abco->o", patch, kernel) + bias)
                # Channel after channel, and last the bias.
                row = np.append(patch.transpose(2, 0, 1).reshape(-1), 1)
                inputs += np.outer(row, row) / 3
                outputs += np.outer(g, g) / 3 / len(positions)
            np.testing.assert_allclose(
                factor.inputs[group], inputs, rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(
                factor.outputs[group], outputs, rtol=1e-4, atol=1e-4
            )
        weight = factor.entries["kernel"][1, 2]  # of output 5, by channel and place
        expected = np.arange(48).reshape(2, 2, 2, 6).transpose(2, 0, 1, 3)[..., 5]
        np.testing.assert_array_equal(weight, expected.reshape(-1))
        np.testing.assert_array_equal(
            factor.entries["bias"][..., 0], [[0, 1, 2], [3, 4, 5]]
        )

    def test_convolutions_are_exact_where_positions_are_uncorrelated(self) -> None:
        """The Kronecker form assumes it; here all patterns of signs make it so."""
        model = nn.Conv(1, (2,), padding="VALID", use_bias=False)
        params = {"kernel": array(2, 3, 1)}
        signs = np.asarray(list(itertools.product([-1.0, 1.0], repeat=4)), np.float32)
        samples = {"x": np.repeat(array(1, 5, 3), 16, axis=0), "signs": signs}

        def loss(p, batch):
            y = model.apply({"params": p}, batch["x"])[..., 0]
            return jnp.mean(jnp.sum(y * batch["signs"], axis=1))

        (factor,) = factors_of(loss, params, samples).values()
        fisher = dense_fisher(loss, params, samples, ["kernel"])
        assert_block(factor, fisher, ["kernel"])
        assert factor.outputs.item() == pytest.approx(1)

    def test_a_dense_layer_over_positions_is_a_1x1_convolution(self) -> None:
        kernel, x = array(3, 2), array(4, 5, 3)
        weigh = lambda y: jnp.mean(jnp.sum(jnp.sin(y), (1, 2)))  # noqa: E731
        dense = factors_of(lambda p, x: weigh(x @ p["w"]), {"w": kernel}, x)["w"]
        model = nn.Conv(2, (1,), use_bias=False)
        conv = factors_of(
            lambda p, x: weigh(model.apply({"params": {"kernel": p["w"]}}, x)),
            {"w": kernel[None]},
            x,
        )["w"]
        np.testing.assert_allclose(dense.inputs, conv.inputs, rtol=1e-6)
        np.testing.assert_allclose(dense.outputs, conv.outputs, rtol=1e-5)
        np.testing.assert_array_equal(dense.entries["w"], conv.entries["w"])

    def test_what_is_not_prunable_is_not_in_the_factors(self) -> None:
        params = {"kernel": array(4, 3), "bias": array(3)}
        loss = lambda p, x: jnp.sum(jnp.sin(x @ p["kernel"] + p["bias"]))  # noqa: E731
        x = array(2, 4)
        both = factors_of(loss, params, x, EVERYTHING)["kernel"]
        weight = factors_of(loss, params, x, "kernel")["kernel"]
        bias = factors_of(loss, params, x, "bias")["kernel"]
        np.testing.assert_allclose(weight.inputs, both.inputs[:, :4, :4])
        np.testing.assert_allclose(bias.inputs, [[[1]]])
        assert list(weight.entries) == ["kernel"]
        assert list(bias.entries) == ["bias"]

    @pytest.mark.parametrize("microbatch_size", [1, 3, 100])
    def test_parts_and_batches_do_not_matter(self, microbatch_size) -> None:
        params = {"w": array(4, 3)}
        loss = lambda p, x: jnp.mean(jnp.sum(jnp.sin(x @ p["w"]), axis=1))  # noqa: E731
        x = array(12, 4)
        whole = factors_of(loss, params, x[:8])["w"]
        parts = factors_of(
            loss,
            params,
            iter([x[:5], x[5:]]),
            num_samples=4,
            batch_size=2,
            microbatch_size=microbatch_size,
        )["w"]
        np.testing.assert_allclose(parts.inputs, whole.inputs, rtol=1e-12)
        np.testing.assert_allclose(parts.outputs, whole.outputs, rtol=1e-5)

    def test_arrays_that_the_loss_depends_on(self) -> None:
        """NumPy would add them up while tracing and jit would not: other equations."""

        def loss(scale, p, x):
            return jnp.mean(jnp.sin((scale + 1) * x @ p["w"]))

        params, x = {"w": array(4, 3)}, array(2, 4)
        found = factors_of(Partial(loss, np.float32(2.0)), params, x)["w"]
        expected = factors_of(lambda p, x: loss(2.0, p, x), params, x)["w"]
        np.testing.assert_allclose(found.outputs, expected.outputs, rtol=1e-5)


def conv_loss(model: nn.Module):
    def loss(p, x):
        return jnp.mean(jnp.sum(jnp.sin(model.apply({"params": p}, x)), (1, 2, 3)))

    return loss


def conv_layer(groups: int = 1):
    params = {"kernel": array(2, 2, 2 // groups, 4), "bias": array(4)}
    loss = conv_loss(nn.Conv(4, (2, 2), feature_group_count=groups))
    return loss, params, array(6, 3, 3, 2)


class TestInverse:
    def test_groups_are_layers_of_their_own(self) -> None:
        loss, params, x = conv_layer(groups=2)
        inverses = damped_inverse(factors_of(loss, params, x), 1e-3, pi=True)
        (whole,) = diagonal(inverses).values()
        for group in range(2):
            own = slice(2 * group, 2 * group + 2)
            part = {name: leaf[..., own] for name, leaf in params.items()}
            # The loss is a sum over outputs, so that it falls apart like the layer.
            loss = conv_loss(nn.Conv(2, (2, 2)))
            factors = factors_of(loss, part, x[..., group : group + 1])
            (found,) = diagonal(damped_inverse(factors, 1e-3, pi=True)).values()
            np.testing.assert_allclose(whole[..., own], found, rtol=1e-4)

    def test_large_activations_and_small_damping(self) -> None:
        """Directions without samples are distinguished by the damping alone."""
        params, x = {"w": array(30, 2)}, 100 * array(5, 30)
        loss = lambda p, x: jnp.mean(jnp.sum(jnp.sin(x @ p["w"] / 1e3), 1))  # noqa: E731
        factors = factors_of(loss, params, x)
        found = diagonal(damped_inverse(factors, 1e-10))["w"]
        a = np.float64(x).T @ np.float64(x) / 5
        inverse = np.linalg.inv(a + 1e-5 * np.eye(30))
        s = np.diag(np.linalg.inv(factors["w"].outputs[0] + 1e-5 * np.eye(2)))
        np.testing.assert_allclose(found, np.outer(np.diag(inverse), s), rtol=1e-5)


def problem_of(loss_fn, params, samples, num_samples) -> Problem:
    masks = init_masks(params)
    return Problem(
        as_partial(loss_fn), params, masks, samples, flat_order(masks), num_samples
    )


class TestPasses:
    def test_factors_and_inverses_take_their_room(self) -> None:
        """Of two layers, 30 x 40 and 40 x 5, in float64."""
        params = {"w": np.ones((30, 40), np.float32), "v": np.ones((40, 5), np.float32)}
        loss = lambda p, x: jnp.mean(jnp.sin(x @ p["w"]) @ p["v"])  # noqa: E731
        problem = problem_of(loss, params, np.ones((1, 30), np.float32), 64)
        factors = 8 * (30**2 + 40**2 + 40**2 + 5**2)
        few, many = passes(problem, 2), passes(problem, 64)
        assert few.bytes_after == many.bytes_after == 2 * factors + 3 * 8 * 40**2
        assert few.bytes >= 3 * factors
        # Inputs and output gradients of 62 more examples of the wider layer.
        assert many.bytes - few.bytes >= 62 * 8 * (30 + 40)
        # A Cholesky factor, its inverse and their product.
        assert few.flops_after == 4 * (30**3 + 2 * 40**3 + 5**3)
        # Second moments of all examples, whatever the parts.
        assert few.flops >= 64 * 2 * factors / 8
        np.testing.assert_allclose(few.flops, many.flops, rtol=0.1)

    def test_a_tensor_that_is_no_layer_is_refused_before_anything_starts(self) -> None:
        loss = lambda p, x: jnp.sum(x @ p["w"] @ p["w"])  # noqa: E731
        with pytest.raises(ValueError, match="'w' is used 2 times"):
            passes(problem_of(loss, {"w": array(3, 3)}, array(1, 3), 2), 64)


class TestErrors:
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda p, x: jnp.sum(x), "does not use 'w'"),
            (
                lambda p, x: jnp.sum(x @ p["w"] @ p["w"]),
                r"'w' is used 2 times \(layer, la",
            ),
            (lambda p, x: jnp.sum(x * p["w"][0]), "'w' meets activations in 'mul'"),
            (lambda p, x: jnp.sum(x @ (p["w"] * 2)), "inside or after 'mul'"),
            (
                lambda p, x: jnp.sum(
                    jax.lax.scan(lambda h, _: (h @ p["w"], None), x, length=2)[0]
                ),
                "inside or after 'scan'",
            ),
            (
                lambda p, x: jnp.sum(
                    jnp.einsum("bi,jio->bjo", x, jnp.broadcast_to(p["w"], (2, 3, 3)))
                ),
                r"'w' of shape \(3, 3\) is broadcast to \(2, 3, 3\)",
            ),
        ],
    )
    def test_a_tensor_that_is_no_layer_is_named(self, loss, message) -> None:
        with pytest.raises(ValueError, match=message):
            factors_of(loss, {"w": array(3, 3)}, array(2, 3))

    def test_too_few_examples(self) -> None:
        loss, params, x = conv_layer()
        with pytest.raises(ValueError, match=r"6 examples, but .* is 8"):
            factors_of(loss, params, x, num_samples=4, batch_size=2)

    @pytest.mark.filterwarnings("ignore:invalid value")
    def test_what_is_not_finite(self) -> None:
        params, x = {"w": np.ones((3, 3), np.float32)}, array(2, 3)
        with pytest.raises(ValueError, match="loss_fn returned nan"):
            factors_of(lambda p, x: jnp.log(-jnp.sum((x @ p["w"]) ** 2)), params, x)
        with pytest.raises(ValueError, match="'w' are not finite"):
            factors_of(lambda p, x: jnp.sum(jnp.sqrt(0 * (x @ p["w"]))), params, x)
