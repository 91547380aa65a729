"""One call that prunes so that outputs stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import woodfisher_jax as wf
from woodfisher_jax.options import OptionError

PARAMS = {"hidden": normal(0, 6, 8) / 2, "out": normal(1, 8, 3) / 2}
INPUTS = np.asarray(normal(2, 60, 6))
BROKEN = PARAMS | {"out": PARAMS["out"].at[0, 0].set(np.nan)}


def net(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def distance(params) -> float:
    return float(jnp.mean((net(params, INPUTS) - net(PARAMS, INPUTS)) ** 2))


@pytest.mark.slow
def test_outputs_stay_nearer_than_after_one_step_or_magnitude() -> None:
    """With leave-one-out alone, one step took the distance to 4.9."""
    params, masks, info = wf.prune_outputs(net, PARAMS, INPUTS, sparsity=0.6)
    once, _, _ = wf.prune_outputs(net, PARAMS, INPUTS, sparsity=0.6, stages=1)
    magnitude, _, _ = wf.prune(None, PARAMS, method="globalmagni", sparsity=0.6)
    assert info.sparsity == pytest.approx(wf.sparsity(masks))
    assert info.nonzero == 28
    assert distance(params) < distance(once) < distance(magnitude)
    assert distance(params) < 0.6 * distance(magnitude)


def test_it_is_prune_matched_with_the_dense_outputs_as_targets() -> None:
    def stage(number, params):
        order = np.random.default_rng(3).permutation(60)
        chosen = order[np.arange(number * 40, (number + 1) * 40) % 60]
        targets = net(PARAMS, INPUTS)[chosen]
        return wf.matching.Stage(net, INPUTS[chosen], targets)

    expected, masks, _ = wf.prune_matched(stage, PARAMS, sparsity=0.5, stages=2, seed=3)
    stages, compiled = [], []

    def progress(label: str, done: int, total: int) -> None:
        if label == "stages":
            stages.append((done, total))

    def count(name: str, *_: float, **__: str) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    params, found, info = wf.prune_outputs(
        net,
        PARAMS,
        INPUTS,
        sparsity=0.5,
        stages=2,
        num_samples=40,
        seed=3,
        progress=progress,
    )
    jax.monitoring.unregister_event_duration_listener(count)
    # Every stage has the shapes of those above; the network runs on all the inputs.
    assert len(compiled) <= 1
    assert stages == [(0, 2), (1, 2), (2, 2)]
    for path in masks:
        np.testing.assert_array_equal(found[path], masks[path])
        np.testing.assert_allclose(params[path], expected[path], rtol=1e-5, atol=1e-6)
    assert info.num_samples == 40
    assert info.objective == "distance"
    before, after = stage(2, params).wanted, net(params, stage(2, params).inputs)
    relative = np.sum((after - before) ** 2) / np.sum(before**2)
    assert info.outputs_error == pytest.approx(float(relative), rel=1e-4)
    assert "predicted" not in str(info)


def test_what_every_stage_finds_is_warned_of_once() -> None:
    def dead(params, x):
        return net(params, x) + 0 * (x @ params["unread"])

    params = PARAMS | {"unread": normal(3, 6, 3)}

    def stage(number, params):
        return wf.matching.Stage(dead, INPUTS, net(PARAMS, INPUTS))

    for call in (
        lambda: wf.prune_outputs(dead, params, INPUTS, sparsity=0.3, stages=3),
        lambda: wf.prune_matched(stage, params, sparsity=0.3, stages=3),
    ):
        with pytest.warns(wf.PruneWarning) as said:
            call()
        assert [one.filename for one in said] == [__file__]
        start = "in 3 of 3 steps: no sample has a gradient for 'unread'"
        assert str(said[0].message).startswith(start)


@pytest.mark.slow
def test_a_pattern_says_how_far() -> None:
    params, _, info = wf.prune_outputs(
        net, PARAMS, INPUTS, pattern="1:2", stages=1, num_samples=20
    )
    assert info.sparsity == 0.5
    axes = wf.find_axes(net, PARAMS, INPUTS[:1])
    assert wf.patterns.check(params, "1:2", axes=axes) == 36


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, PARAMS, INPUTS), {"sparsity": 0.5}, "net_fn is of type int"),
        ((net, PARAMS, INPUTS), {}, "sparsity is missing"),
        (
            (net, PARAMS, INPUTS * np.nan),
            {"sparsity": 0.5},
            "are not finite for some .* in params or inputs",
        ),
        (
            (net, BROKEN, INPUTS),
            {"sparsity": 0.5},
            r"are not finite for some .* NaN or infinity in params\['",
        ),
        (
            (lambda p, x: 1e20 * net(p, x), PARAMS, INPUTS),
            {"sparsity": 0.5},
            r"net_fn gives outputs of .*e\+20 at most; expected between 1e-15 and 1e",
        ),
        (
            (lambda p, x: 1e-20 * net(p, x), PARAMS, INPUTS),
            {"sparsity": 0.5},
            "net_fn gives outputs of .*e-20 at most",
        ),
        (
            (net, PARAMS, iter([INPUTS])),
            {"sparsity": 0.5},
            "inputs is a list_iterator, which can be read only once",
        ),
        ((net, PARAMS, INPUTS[:1]), {"sparsity": 0.5}, "inputs hold one example"),
        (
            (lambda p, x: (net(p, x), x), PARAMS, INPUTS),
            {"sparsity": 0.5},
            "net_fn returns a tuple; expected one floating-point array",
        ),
        (
            (lambda p, x: net(p, x).argmax(-1), PARAMS, INPUTS),
            {"sparsity": 0.5},
            "net_fn returns an array of int32",
        ),
        (
            (lambda p, x: net(p, x).sum(), PARAMS, INPUTS),
            {"sparsity": 0.5},
            r"net_fn returns an array of shape \(\) for 2 inputs",
        ),
        (
            (net, PARAMS, [0 * INPUTS, 0 * INPUTS[:3]]),
            {"sparsity": 0.5},
            "inputs are all zero, .*expected examples",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, options, message) -> None:
    with pytest.raises(OptionError, match=message):
        wf.prune_outputs(*arguments, **options)


def test_outputs_that_do_not_depend_on_the_weights_are_refused() -> None:
    def dead(params, x):
        return jax.nn.relu(x @ params["hidden"] - 100) @ params["out"]

    message = "no weight has a gradient.*whatever the damping.*units that are dead"
    for damping in ("auto", 1e-3):
        with pytest.raises(ValueError, match=message):
            wf.prune_outputs(dead, PARAMS, INPUTS, sparsity=0.5, damping=damping)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0; expected a whole number from 1"),
        ({"num_samples": "100"}, "num_samples='100'; expected a whole number"),
        ({"num_samples": 2.5}, "num_samples=2.5; expected a whole number"),
        ({"stages": "3"}, "stages='3'; expected a whole number from 1"),
        ({"stages": True}, "stages=True; expected a whole number from 1"),
        ({"seed": "a"}, "seed='a'; expected a whole number from 0"),
        ({"metric": "softmx"}, r"metric='softmx'; expected one of \['identity', 's"),
        ({"metrc": "softmax"}, "prune_outputs .* no option 'metrc'.*mean 'metric'"),
        ({"stage": 3}, "has no option 'stage'; did you mean 'stages'"),
        ({"targets": 1.0}, "has no option 'targets'"),
    ],
)
def test_options_are_checked_before_the_network_runs(options, message) -> None:
    def never(params, x):
        raise AssertionError

    with pytest.raises(OptionError, match=message):
        wf.prune_outputs(never, PARAMS, INPUTS, sparsity=0.5, **options)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_goal_that_cannot_be_is_named_before_the_first_stage(scope: str) -> None:
    begun = []

    def progress(label: str, done: int, total: int) -> None:
        begun.append((label, done))

    with pytest.raises(OptionError, match=r"sparsity=0\.999 leaves none of the"):
        wf.prune_outputs(
            net,
            PARAMS,
            INPUTS,
            sparsity=0.999,
            method="woodtaylorblock",
            scope=scope,
            progress=progress,
        )
    assert begun == [("stages", 0)]
    masks = {"hidden": np.arange(48).reshape(6, 8) % 3 == 0}
    with pytest.raises(OptionError, match=r"sparsity=0\.5 is below the 0\.66"):
        wf.prune_outputs(net, PARAMS, INPUTS, sparsity=0.5, masks=masks)
