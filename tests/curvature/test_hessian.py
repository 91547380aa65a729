"""The diagonal of the Hessian against ``jax.hessian`` in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.curvature.hessian import (
    ESTIMATORS,
    exact_diagonal,
    hutchinson_diagonal,
)
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.trees.prunable import init_masks

RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.standard_normal((6, 6)).astype(np.float32)
MATRIX = (MATRIX + MATRIX.T) / 2


def array(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def quadratic(params, batch):
    """A mean over examples whose Hessians are multiples of one matrix."""
    w = params["w"].reshape(-1)
    return jnp.mean(batch) * (0.5 * w @ MATRIX @ w) + jnp.sum(w)


def mlp(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean(jnp.sum((hidden @ params["w2"] - y) ** 2, axis=1))


MLP = {"w1": array(5, 4), "b1": array(4), "w2": array(4, 3)}
BATCH = array(10, 5), array(10, 3)
MASKS = {"w1": RANDOM.random((5, 4)) < 0.6, "w2": np.ones((4, 3), bool)}
ONES = {"w": np.ones((2, 3), np.float32)}


@functools.cache
def mlp_oracle() -> dict[str, np.ndarray]:
    """diag of the whole Hessian at the masked weights, by ``jax.hessian``."""
    params = {**MLP, "w1": np.where(MASKS["w1"], MLP["w1"], 0)}
    with jax.enable_x64(True):
        params, batch = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), (params, BATCH)
        )
        full = jax.tree.map(np.asarray, jax.jit(jax.hessian(mlp))(params, batch))
        return {
            path: np.where(
                mask,
                np.diag(full[path][path].reshape(mask.size, mask.size)).reshape(
                    mask.shape
                ),
                0,
            )
            for path, mask in MASKS.items()
        }


class TestExact:
    def test_a_quadratic_is_its_diagonal(self) -> None:
        found = exact_diagonal(
            quadratic, ONES, init_masks(ONES), np.ones(4, np.float32), num_samples=4
        )
        diagonal = np.asarray(found["w"]).reshape(-1)
        np.testing.assert_allclose(diagonal, np.diag(MATRIX), rtol=1e-6)

    @pytest.mark.parametrize(
        "probes_at_once", [5, pytest.param(100, marks=pytest.mark.slow)]
    )
    def test_oracle_in_float64(self, probes_at_once) -> None:
        expected = mlp_oracle()
        with jax.enable_x64(True):
            params, batch = jax.tree.map(
                lambda a: jnp.asarray(a, jnp.float64), (MLP, BATCH)
            )
            found = exact_diagonal(
                mlp,
                params,
                MASKS,
                batch,
                num_samples=10,
                microbatch_size=4,
                probes_at_once=probes_at_once,
            )
        assert list(found) == ["w1", "w2"]
        for path, diagonal in found.items():
            assert diagonal.dtype == jnp.float64
            np.testing.assert_allclose(diagonal, expected[path], rtol=1e-12, atol=1e-14)

    def test_float32(self) -> None:
        found = exact_diagonal(mlp, MLP, MASKS, BATCH, num_samples=10)
        for path, expected in mlp_oracle().items():
            assert found[path].dtype == jnp.float32
            np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-5)
            assert not np.asarray(found[path])[~MASKS[path]].any()

    def test_the_first_examples_count_as_often_as_each_other(self) -> None:
        """Seven examples in parts of three, three and one; the others are not read."""
        masks = {"w": np.ones((2, 3), bool)}
        weights = np.asarray([1, 2, 3, 4, 5, 6, 14, 1e9], np.float32)
        found = exact_diagonal(
            quadratic, ONES, masks, weights, num_samples=7, microbatch_size=3
        )
        diagonal = np.asarray(found["w"]).reshape(-1)
        np.testing.assert_allclose(diagonal, 5 * np.diag(MATRIX), rtol=1e-5)

    def test_a_kernel_is_read_in_its_own_order_again(self) -> None:
        """The flat order transposes a Flax kernel; results come back in its shape."""
        scale = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
        loss = lambda p, x: jnp.mean(x) * jnp.sum(scale * p["kernel"] ** 2)  # noqa: E731
        params = {"kernel": ONES["w"]}
        for estimate in ESTIMATORS.values():
            found = estimate(
                loss, params, init_masks(params), np.ones(2, np.float32), num_samples=2
            )
            np.testing.assert_allclose(found["kernel"], 2 * scale, rtol=1e-6)

    def test_low_precision_weights(self) -> None:
        params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
        loss = lambda p, x: jnp.mean(x) * jnp.sum(p["w"] ** 2)  # noqa: E731
        found = exact_diagonal(
            loss, params, init_masks(params), np.ones(2, np.float32), num_samples=2
        )
        assert found["w"].dtype == jnp.float32
        np.testing.assert_allclose(found["w"], np.full((2, 3), 2.0))


class TestHutchinson:
    def test_a_diagonal_hessian_takes_one_probe(self) -> None:
        loss = lambda p, x: jnp.mean(x) * jnp.sum(p["w"] ** 4)  # noqa: E731
        found = hutchinson_diagonal(
            loss,
            ONES,
            init_masks(ONES),
            np.ones(2, np.float32),
            num_samples=2,
            num_probes=1,
        )
        np.testing.assert_allclose(found["w"], np.full((2, 3), 12.0), rtol=1e-6)

    def test_error_is_the_statistical_one(self) -> None:
        """Variance Σ_{r≠q} H_qr² / P, over the weights that are kept alone."""
        mask = np.asarray([[True, True, False], [True, True, True]])
        options = {"num_samples": 1, "num_probes": 50}
        kept = mask.reshape(-1)
        cross = np.where(np.outer(kept, kept) & ~np.eye(6, dtype=bool), MATRIX, 0)
        deviation = np.sqrt(np.sum(cross**2, axis=1) / 50)[kept]
        scores = []
        for seed in range(20):
            found = hutchinson_diagonal(
                quadratic,
                ONES,
                {"w": mask},
                np.ones(1, np.float32),
                seed=seed,
                **options,
            )
            diagonal = np.asarray(found["w"]).reshape(-1)
            assert not diagonal[~kept].any()
            scores.append((diagonal - np.diag(MATRIX))[kept] / deviation)
        scores = np.asarray(scores)
        assert np.abs(scores.mean(0)).max() < 4 / np.sqrt(20)
        assert 0.6 < np.mean(scores**2) < 1.5

    @pytest.mark.slow
    def test_parts_do_not_matter_but_the_seed_does(self) -> None:
        def run(**options):
            return hutchinson_diagonal(
                mlp, MLP, MASKS, BATCH, num_samples=10, num_probes=6, **options
            )["w1"]

        whole = run()
        for options in ({"probes_at_once": 6}, {"microbatch_size": 4}):
            np.testing.assert_allclose(run(**options), whole, rtol=1e-4, atol=1e-5)
        assert np.abs(run(seed=1) - whole).max() > 0.01


@pytest.mark.parametrize("name", ESTIMATORS)
class TestErrors:
    def test_too_few_examples(self, name) -> None:
        with pytest.raises(ValueError, match="hold 10 examples, but num_samples=11"):
            ESTIMATORS[name](mlp, MLP, MASKS, BATCH, num_samples=11, microbatch_size=4)

    def test_not_finite(self, name) -> None:
        params = {"w": jnp.zeros((2, 2))}
        loss = lambda p, x: jnp.sum(jnp.sqrt(p["w"]))  # noqa: E731
        with pytest.raises(ValueError, match="'w' is not finite"):
            ESTIMATORS[name](
                loss, params, init_masks(params), np.ones((1, 1)), num_samples=1
            )


def test_samples_may_be_any_stream() -> None:
    parts = iter([(BATCH[0][:3], BATCH[1][:3]), (BATCH[0][3:], BATCH[1][3:])])
    found = exact_diagonal(mlp, MLP, MASKS, parts, num_samples=10, microbatch_size=5)
    expected = exact_diagonal(mlp, MLP, MASKS, BATCH, num_samples=10)
    for path, diagonal in leaves_by_path(expected).items():
        np.testing.assert_allclose(found[path], diagonal, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_that_is_not_finite_is_refused(estimator) -> None:
    """Its derivatives are finite, so that nothing else would show it."""

    def loss_fn(params, x):
        return jnp.mean(x @ params["w"] ** 2) + jnp.mean(jnp.where(x > 5, jnp.nan, 0))

    x = np.ones((6, 2), np.float32)
    x[4] = 9
    params = {"w": jnp.ones(2)}
    masks = {"w": jnp.ones(2, bool)}
    with pytest.raises(
        ValueError, match="loss_fn returned nan at example 1 of a batch"
    ):
        ESTIMATORS[estimator](
            loss_fn, params, masks, x, num_samples=6, microbatch_size=3
        )
