"""Stages that keep a network's outputs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import woodfisher_jax as wf
from woodfisher_jax.equations.damping import MULTIPLES
from woodfisher_jax.rows import gradients
from woodfisher_jax.stages.matching import (
    LABEL_DAMPING,
    Stage,
    label_rows,
    matching_rows,
    outputs_of,
    prune_matched,
)


def net(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["out"]


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(first, (10, 12)) / 3,
        "out": jax.random.normal(second, (12, 4)) / 3,
    }


def images(number: int, count: int = 60, width: int = 10) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(count, width)).astype(np.float32)


def stage_of(dense: Any, i: int, params: Any) -> Stage:
    return Stage(net, images(i), net(dense, images(i)))


def test_rows_and_targets_are_those_of_the_definition(params: Any) -> None:
    x, wanted = images(0), jnp.ones((60, 4))
    rows = matching_rows(Stage(net, x, wanted), params, jax.random.key(1))
    r, missed = rows.samples["direction"], wanted - net(params, x)
    np.testing.assert_allclose(rows.targets, np.sum(r * missed, 1), rtol=1e-5)
    one = {"inputs": x[:1], "direction": r[:1]}
    np.testing.assert_allclose(
        rows.loss_fn(params, one), np.sum(r[0] * net(params, x)[0]), rtol=1e-5
    )


def cross_entropy(params: Any, x: Any, labels: Any) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(net(params, x))
    return -jnp.mean(log_probabilities[jnp.arange(len(labels)), labels])


def labels_of(x: np.ndarray) -> np.ndarray:
    return (x[:, 0] > 0).astype(np.int32) + 2 * (x[:, 1] > 0)


def test_label_rows_have_the_slope_of_the_loss_and_the_scale_of_one_example(
    params: Any,
) -> None:
    x = images(0, 64)
    rows = label_rows(Stage(net, x, labels_of(x)), batch_size=4)
    means = jax.tree.map(lambda a: a.reshape(16, 4, *a.shape[1:]), rows.samples)
    found = jax.jit(jax.vmap(jax.grad(rows.loss_fn), (None, 0)))(params, means)
    gradient = jax.jit(jax.grad(cross_entropy))
    slope = gradient(params, x, labels_of(x))
    for path, row in found.items():
        np.testing.assert_allclose(
            -rows.targets * np.mean(row, 0), slope[path], rtol=1e-4, atol=1e-6
        )
    one = gradient(params, x[:4], labels_of(x[:4]))
    np.testing.assert_allclose(found["out"][0], 2.0 * one["out"], rtol=1e-4, atol=1e-6)
    assert (rows.targets, rows.batch_size) == (-0.5, 4)


@pytest.mark.slow
def test_stages_towards_labels_train(params: Any) -> None:
    test = images(99, 400)
    drawn = []

    def stage(i: int, p: Any) -> Stage:
        drawn.append(images(i, 160))
        return Stage(net, drawn[-1], labels_of(drawn[-1]))

    found, masks, infos = prune_matched(
        stage, params, sparsity=[0.3] * 12, batch_size=4
    )
    before, after = (cross_entropy(p, test, labels_of(test)) for p in (params, found))
    assert after < before / 2
    assert {info.num_samples for info in infos} == {40}
    assert all(info.dampings is None for info in infos)  # LABEL_DAMPING
    assert LABEL_DAMPING == 1e-2
    assert wf.sparsity(masks) == pytest.approx(0.3, abs=0.01)


def test_outputs_are_found_some_at_a_time(params: Any) -> None:
    x = images(0)
    np.testing.assert_allclose(
        outputs_of(net, params, x, batch_size=7), net(params, x), rtol=1e-5
    )


def test_a_linear_network_is_fitted_by_least_squares() -> None:
    """With little damping one step is the regression on the weights that stay."""
    out = jnp.asarray(np.random.default_rng(3).normal(size=(12, 1)), jnp.float32)
    x = images(1, 80, 12)
    found, masks, _ = prune_matched(
        lambda i, p: Stage(linear, x, linear({"out": out}, x)),
        {"out": out},
        sparsity=0.5,
        stages=1,
        damping=1e-6,
    )
    kept = np.asarray(masks["out"])[:, 0]
    best = np.linalg.lstsq(x[:, kept], x @ np.asarray(out), rcond=None)[0]
    assert kept.sum() == 6
    np.testing.assert_allclose(found["out"][kept], best, rtol=1e-3, atol=1e-4)
    assert not np.any(found["out"][~kept])


@pytest.mark.slow
def test_stages_keep_the_outputs_better_than_a_step_and_than_magnitude(
    params: Any,
) -> None:
    x = images(99, 400)

    @jax.jit
    def distance(found: Any) -> jax.Array:
        return jnp.mean((net(found, x) - net(params, x)) ** 2)

    run = partial(prune_matched, partial(stage_of, params), params, sparsity=0.7)
    stages, masks, infos = run(stages=4)
    once = run(stages=1)[0]
    magnitude = wf.prune(None, params, sparsity=0.7, method="globalmagni")[0]
    assert distance(stages) < distance(once) < distance(magnitude)
    assert wf.sparsity(masks) == pytest.approx(0.7, abs=0.01)
    kept = [info.nonzero for info in infos]
    ratios = np.asarray(kept[1:]) / np.asarray(kept[:-1])
    np.testing.assert_allclose(ratios, 0.3 ** (1 / 4), atol=0.03)
    for info in infos:
        assert info.dampings is not None
        assert all(chosen.multiple in MULTIPLES for chosen in info.dampings)
        assert len(info.dampings) == 2


def test_repairs_prune_nothing_and_help(params: Any) -> None:
    x = images(99, 400)
    run = partial(prune_matched, partial(stage_of, params), params, sparsity=0.7)
    plain, masks, _ = run(stages=2)
    repaired, same, infos = run(stages=2, repairs=3)
    assert len(infos) == 5
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, same[path])
    wanted = net(params, x)
    assert jnp.mean((net(repaired, x) - wanted) ** 2) < jnp.mean(
        (net(plain, x) - wanted) ** 2
    )


@pytest.mark.slow
def test_statistics_pass_through_without_compiling_again(params: Any) -> None:
    """The outputs may depend on arrays that change from stage to stage."""

    def scaled(scale: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        return scale * net(params, x)

    sizes = []

    def stage(i: int, p: Any) -> Stage:
        sizes.append(gradients._chunk._cache_size())
        scale = jnp.asarray(1.0 + i)
        return Stage(Partial(scaled, scale), images(i), scale * net(params, images(i)))

    _, masks, _ = prune_matched(stage, params, sparsity=[0.2] * 3, damping=0.1)
    assert wf.sparsity(masks) == pytest.approx(0.2, abs=0.01)
    assert sizes[2] == sizes[1] == sizes[0] + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "stages": 0}, "stages=0; expected a whole number from 1"),
        ({"sparsity": 0.5, "repairs": -1}, "repairs=-1"),
        ({"sparsity": []}, "sparsity is an empty list"),
        ({"sparsity": 90}, r"sparsity=90; expected a fraction .*weights.*mean 0\.9\?"),
        ({"sparsity": [0.5, 1.5]}, "sparsity=1.5; expected"),
        ({"sparsity": "90%"}, r"sparsity='90%'; expected.*; did you mean 0\.9\?"),
        ({"sparsity": 0.5, "metric": "cosine"}, "metric='cosine'"),
        ({"sparsity": 0.5, "method": "woodfisher"}, "targets.*woodtaylor"),
        (
            {"sparsity": [0.5, 0.3]},
            r"sparsity=\[0.5, 0.3\]; expected levels that do not",
        ),
        ({"sparsity": 0.5, "num_samples": 20}, r"targets has shape \(60,\)"),
        ({"sparsity": 0.5, "recompute": 2}, "targets are values for the rows"),
    ],
)
def test_bad_input(params: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_matched(partial(stage_of, params), params, **options)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (np.ones((20, 8)), "stage is of type ndarray; expected a function"),
        (lambda i, p: (p, i), r"stage\(0, params\) returned tuple; expected a wf.mat"),
    ],
)
def test_what_is_no_stage_is_refused(params: Any, stage: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        prune_matched(stage, params, sparsity=0.5)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (net, r"stage\(0, params\) fails \(TypeError: .*not the network: lambda i, p"),
        (lambda i: Stage(net, i, i), r"stage\(0, params\) fails .*expected a function"),
        (lambda i, p: Stage(images(0), net, 0), "outputs_fn is of type ndarray; exp"),
        (lambda i, p: Stage(net, images(0), None), "wanted is of type NoneType; exp"),
    ],
)
def test_what_is_wrong_with_a_stage_is_said(params, stage, message) -> None:
    with pytest.raises(wf.OptionError, match=message):
        prune_matched(stage, params, sparsity=0.5)


def test_params_and_stage_in_the_wrong_order_are_named(params: Any) -> None:
    with pytest.raises(TypeError, match="stage is of type dict; expected a function"):
        prune_matched(params, net, sparsity=0.5)


def test_outputs_whose_squares_leave_float32_are_refused(params: Any) -> None:
    def far(i: int, p: Any) -> Stage:
        stage = stage_of(params, i, p)
        return stage._replace(wanted=np.asarray(stage.wanted) * np.float32(1e20))

    def large(i: int, p: Any) -> Stage:
        stage = stage_of(params, i, p)
        return stage._replace(outputs_fn=lambda p, x: 1e20 * stage.outputs_fn(p, x))

    with pytest.raises(wf.OptionError, match=r"wanted outputs are .*e\+20 at most"):
        prune_matched(far, params, sparsity=0.5)
    with pytest.raises(wf.OptionError, match=r"network's outputs are .*e\+20 at most"):
        prune_matched(large, params, sparsity=0.5)


def test_what_after_returns_is_where_the_next_stage_starts(params: Any) -> None:
    begun = []

    def stage(i: int, p: Any) -> Stage:
        begun.append(p)
        return stage_of(params, i, p)

    def after(i: int, p: Any, masks: Any, info: Any) -> Any:
        return None if i else jax.tree.map(lambda leaf: leaf / 2, p)

    plain = prune_matched(partial(stage_of, params), params, sparsity=0.3, stages=1)[0]
    prune_matched(stage, params, sparsity=[0.3, 0.4, 0.5], after=after)
    for path, leaf in begun[1].items():
        np.testing.assert_array_equal(leaf, plain[path] / 2)
    assert not np.allclose(begun[2]["out"], begun[1]["out"])
