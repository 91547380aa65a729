"""``damping="auto"`` and ``targets`` of a pruning step, through the whole pipeline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.equations.damping import choose_damping, leave_one_out

N, D = 24, 60


def linear(params: Any, batch: Any) -> jax.Array:
    """A loss whose gradients are the examples themselves."""
    weights = jnp.concatenate([params["a"].ravel(), params["b"].ravel()])
    return jnp.mean(batch @ weights)


@pytest.fixture(scope="module")
def problem() -> tuple[dict[str, jax.Array], np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, 5)) @ rng.normal(size=(5, D))
    rows += 0.3 * rng.normal(size=rows.shape)
    weights = rng.normal(size=D)
    params = {
        "a": jnp.asarray(weights[:40].reshape(8, 5), jnp.float32),
        "b": jnp.asarray(weights[40:].reshape(4, 5), jnp.float32),
    }
    return params, rows.astype(np.float32)


def flat(tensors: Any) -> np.ndarray:
    return np.concatenate([np.ravel(tensors["a"]), np.ravel(tensors["b"])])


def gram(rows: np.ndarray) -> jax.Array:
    return jnp.asarray(rows @ rows.T)


@pytest.mark.parametrize(
    ("with_targets", "block_size"),
    [
        pytest.param(False, None, marks=pytest.mark.slow),
        pytest.param(False, 7, marks=pytest.mark.slow),
        (True, None),
        pytest.param(True, 7, marks=pytest.mark.slow),
    ],
)
def test_the_choices_are_those_of_the_pruned_weights(
    problem: Any, block_size: int | None, with_targets: bool
) -> None:
    params, rows = problem
    targets = np.linspace(-1, 1, N).astype(np.float32) if with_targets else None
    method = "woodtaylor" if with_targets else "woodfisher"
    given = {} if targets is None else {"targets": targets}
    _, masks, info = wf.prune(
        linear,
        params,
        rows,
        sparsity=0.5,
        method=method,
        update="joint",
        damping="auto",
        block_size=block_size,
        **given,
    )
    weights, kept = flat(params), flat(masks)
    values = np.zeros(N, np.float32) if targets is None else targets
    small = np.abs(weights) <= np.sort(np.abs(weights))[D // 2 - 1]
    right = jnp.asarray(rows @ np.where(small, weights, 0) + values)
    first = choose_damping(leave_one_out(gram(rows), right), N)
    right = jnp.asarray(rows @ np.where(kept, 0, weights) + values)
    second = choose_damping(leave_one_out(gram(np.where(kept, rows, 0)), right), N)
    steps = []
    for found, expected in zip(info.dampings, (first, second), strict=True):
        factor = found.multiple / expected.multiple
        assert found.damping == pytest.approx(factor * expected.damping, rel=1e-4)
        steps.append(np.log10(factor))
    # The update's is then changed by factors of ten: less where losses are to stay,
    # more where blocks that each compensate for all of it go too far together.
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)
    assert steps[0] == 0
    if with_targets and block_size is None:
        assert steps[1] == 0


@pytest.mark.slow
def test_damping_is_raised_where_a_step_leads_beyond_its_linear_model() -> None:
    """Rows that are means agree; tanh saturates, which no gradient before it shows."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "hidden": jax.random.normal(keys[0], (6, 8)),
        "out": jax.random.normal(keys[1], (8, 1)),
    }
    x = jax.random.normal(keys[2], (40, 6))

    def outputs(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x @ params["hidden"]) @ params["out"])

    given = {"sparsity": 0.7, "method": "woodfisher", "update": "joint"}
    found, _, info = wf.prune(outputs, params, x, damping="auto", **given)

    def missed(after: Any) -> float:
        every = jax.vmap(outputs, (None, 0))
        return float(jnp.mean((every(after, x) - every(params, x)) ** 2))

    assert info.dampings is not None
    assert info.dampings[1].multiple > info.dampings[0].multiple
    for level in (1e-3, 1e-2, 0.1, 1.0):
        other, *_ = wf.prune(outputs, params, x, damping=level, **given)
        assert missed(found) < missed(other)


def test_the_result_is_that_of_the_chosen_number(problem: Any) -> None:
    """With the sum of updates one damping is chosen, and it is used for both."""
    params, rows = problem
    given = {"sparsity": 0.6, "method": "woodfisher"}
    found, masks, info = wf.prune(linear, params, rows, damping="auto", **given)
    assert info.dampings is not None
    (chosen,) = info.dampings
    again, same, plain = wf.prune(linear, params, rows, damping=chosen.damping, **given)
    assert plain.dampings is None
    np.testing.assert_array_equal(flat(masks), flat(same))
    np.testing.assert_allclose(flat(found), flat(again), rtol=1e-4, atol=1e-5)


def test_targets_are_reached_in_float64_s_answer(problem: Any) -> None:
    """δ_S = G_Sᵀ (N λ I + G_S G_Sᵀ)⁻¹ (G_P w_P + y)."""
    params, rows = problem
    targets = np.linspace(-2, 2, N)
    found, masks, _ = wf.prune(
        linear,
        params,
        rows,
        sparsity=0.5,
        method="woodtaylor",
        update="joint",
        damping=0.1,
        targets=targets,
    )
    weights, kept = flat(params).astype(float), flat(masks)
    staying = np.where(kept, rows, 0).astype(float)
    missed = rows @ np.where(kept, 0, weights) + targets
    system = staying @ staying.T + N * 0.1 * np.eye(N)
    expected = np.where(kept, weights + staying.T @ np.linalg.solve(system, missed), 0)
    np.testing.assert_allclose(flat(found), expected, rtol=2e-3, atol=2e-4)


def test_the_statistic_is_taken_after_the_newton_step(problem: Any) -> None:
    params, rows = problem
    targets = np.linspace(-2, 2, N)
    _, masks, _ = wf.prune(
        linear,
        params,
        rows,
        sparsity=0.5,
        method="woodtaylor",
        damping=0.1,
        targets=targets,
    )
    inverse = np.linalg.inv(0.1 * np.eye(D) + rows.T @ rows.astype(float) / N)
    newton = inverse @ (-rows.T @ targets / N)
    scores = (flat(params) - newton) ** 2 / (2 * np.diag(inverse))
    np.testing.assert_array_equal(flat(masks), scores > np.sort(scores)[D // 2 - 1])


def test_targets_of_minus_one_are_the_mean_gradient(problem: Any) -> None:
    params, rows = problem
    given = {"sparsity": 0.5, "method": "woodtaylor", "damping": 0.1}
    for update in ("sum", "joint"):
        found = wf.prune(linear, params, rows, update=update, **given)[0]
        again = wf.prune(
            linear, params, rows, update=update, targets=-np.ones(N), **given
        )[0]
        np.testing.assert_allclose(flat(found), flat(again), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [np.full(N, np.nan), np.ones(N - 1)])
def test_targets_are_one_finite_number_for_each_row(problem: Any, targets: Any) -> None:
    params, rows = problem
    given = {"sparsity": 0.5, "method": "woodtaylor", "targets": targets}
    with pytest.raises(ValueError, match="expected one finite number"):
        wf.prune(linear, params, rows, **given)


# ------------------------------------------------------ the Newton step, damped little

ROWS = (10 * np.random.default_rng(0).standard_normal((5, 40))).astype(np.float32)
OTHERS = (10 * np.random.default_rng(1).standard_normal((7, 40))).astype(np.float32)
WEIGHTS = np.random.default_rng(2).standard_normal(40).astype(np.float32)
CHANGES = np.linspace(-1, 2, 5)


def linear_loss(params, batch):
    """Each gradient is an example."""
    return jnp.mean(batch @ params["w"])


def pruned_at(damping, rows=ROWS, **options):
    found = wf.prune(
        linear_loss,
        {"w": jnp.asarray(WEIGHTS)},
        rows,
        sparsity=0.5,
        method="woodtaylor",
        damping=damping,
        prunable="w",
        **options,
    )
    return np.asarray(found[0]["w"]), np.asarray(found[1]["w"])


def surgeon(damping, mean=None, targets=-1.0, centered=False):
    """Oracle in float64; without a mean h is taken in sample space."""
    G = np.float64(ROWS)
    mean = G.mean(0) if centered else mean
    G = G - centered * G.mean(0)
    S = len(G) * damping * np.eye(len(G)) + G @ G.T
    inverse = lambda v: (v - G.T @ np.linalg.solve(S, G @ v)) / damping  # noqa: E731
    h = -G.T @ np.linalg.solve(S, np.broadcast_to(targets, len(G)))
    h = h if mean is None else inverse(mean)
    diagonal = (1 - np.sum(G * np.linalg.solve(S, G), 0)) / damping
    scores = (WEIGHTS - h) ** 2 / diagonal
    mask = scores >= np.sort(scores)[len(h) // 2]
    direction = np.where(mask, 0, -(WEIGHTS - h) / diagonal)
    return np.where(mask, WEIGHTS + inverse(direction) - h, 0), mask


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param({"store": "recompute"}, {}, marks=pytest.mark.slow),
        ({"targets": CHANGES}, {"targets": CHANGES}),
        pytest.param(
            {"mean_samples": OTHERS},
            {"mean": np.float64(OTHERS).mean(0)},
            marks=pytest.mark.slow,
        ),
        pytest.param({"centered": True}, {"centered": True}, marks=pytest.mark.slow),
    ],
)
def test_the_newton_step_is_right_at_small_damping(options, oracle) -> None:
    new, mask = pruned_at(1e-8, **options)
    weights, expected = surgeon(1e-8, **oracle)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(new, weights, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_mean_that_rounding_takes_out_of_the_span_is_refused() -> None:
    with pytest.raises(wf.CurvatureError, match="raise damping"):
        pruned_at(1e-6, mean_samples=ROWS)


# --------------------------------------------------------------------- units of weight

SMALL, FLAT = 2.0**-40, 2.0**-47
"""Powers of two, so that all results are the same but for a factor."""


@pytest.mark.parametrize(
    "options",
    [
        {"method": "woodfisher", "normalize_update": 0.01},
        {"method": "globalmagni", "pattern": "2x2"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"method": "woodfisherblock", "store": "recompute"},
                {"method": "woodfisherblock", "pattern": "2:4"},
                {"method": "diagfisher"},
            )
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_no_unit_of_weight_or_loss_changes_the_mask(options) -> None:
    x = np.random.default_rng(3).standard_normal((7, 8)).astype(np.float32)
    w = np.random.default_rng(4).standard_normal((8, 4)).astype(np.float32)

    def pruned(unit, scale, damping):
        given = dict(options)
        if given["method"] not in ("diagfisher", "globalmagni"):
            given["damping"] = damping
        params, masks, _ = wf.prune(
            linear_loss, {"w": jnp.asarray(unit * w)}, scale * x, sparsity=0.5, **given
        )
        return np.asarray(params["w"]) / unit, np.asarray(masks["w"])

    # Squares of these weights over the largest entry of F⁻¹, 1e30, are 1e-54.
    weights, mask = pruned(SMALL, FLAT, 0.02 * FLAT**2)
    expected, expected_mask = pruned(1.0, 1.0, 0.02)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
