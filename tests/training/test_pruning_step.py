"""The samples, options and goals of a pruning step follow from the config."""

from typing import Any

import jax
import numpy as np
import pytest
import spread_training  # noqa: F401 (has the model "net")
from small_runs import small

import woodfisher_jax as wf
from woodfisher_jax import data
from woodfisher_jax.report.elements.quantities import counted
from woodfisher_jax.training import pruning_step
from woodfisher_jax.training.config import ConfigError, step_options
from woodfisher_jax.training.network.objective import (
    frozen_errors,
    linearized_loss,
    predict,
)
from woodfisher_jax.training.network.train_step import TrainState
from woodfisher_jax.training.plan import Plan, Stage
from woodfisher_jax.training.pruning_step import fisher_batch, forecast, prune_state
from woodfisher_jax.training.start import prepare
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.trees.samples import regroup


def quiet(label: str, done: int, total: int) -> None:
    """Shows no progress."""


def start(**changes: Any) -> tuple[Plan, TrainState]:
    """A plan without training, and the state that it starts from."""
    plan, (variables, masks) = prepare(small(dense__epochs=0, **changes), quiet)
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    return plan, TrainState(params, stats, masks, plan.train.tx.init(params))


@pytest.mark.slow
def test_the_options_of_the_config_are_those_of_the_step() -> None:
    given = {"block_size": 50, "recompute": 1, "store_dtype": "bfloat16"}
    more = {"diagnostics": True, "scope": "layer", "memory_limit_gb": 8.0}
    changes = {f"prune__{name}": value for name, value in (given | more).items()}
    plan, state = start(**changes, prune__damping_plus_weight_decay=True)
    new, record = prune_state(plan, state, Stage(0, 0.5, "prune"), [])
    params, masks, info = wf.prune(
        pruning_step._fisher_loss(plan, plan.config.prune, {}),
        state.params,
        lambda again: fisher_batch(plan, plan.config.prune, state, 0, again),
        sparsity=0.5,
        method="woodfisherblock",
        masks=state.masks,
        num_samples=50,
        weight_decay=1e-4,
        memory_limit=8e9,
        scope="layer",
        diagnostics=True,
        **given,
    )
    for one, other in zip(
        jax.tree.leaves((new.params, new.masks)),
        jax.tree.leaves((params, masks)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert record["predicted_loss_increase"] == info.predicted_loss_increase
    linear = linearized_loss(plan.model, {}, state.params)
    change = jax.tree.map(np.subtract, new.params, state.params)
    samples = fisher_batch(plan, plan.config.prune, state, 0)
    expected = float(linear(change, samples))
    assert record["train_loss_predicted"] == pytest.approx(expected, rel=1e-5)
    assert record["limit_bytes"] <= 8e9
    assert record["store_dtype"] == "bfloat16"


def test_true_fisher_draws_other_labels() -> None:
    plan, state = start(prune__true_fisher=True)
    pruner = plan.config.prune
    drawn = fisher_batch(plan, pruner, state, 0)
    given = fisher_batch(plan, small().prune, state, 0)
    assert drawn is not None
    assert given is not None
    np.testing.assert_array_equal(drawn["image"], given["image"])
    assert (drawn["label"] != given["label"]).any()
    again = fisher_batch(plan, pruner, state, 0)
    assert again is not None
    np.testing.assert_array_equal(drawn["label"], again["label"])


def in_memory(dataset: data.DataSet) -> data.DataSet:
    """The same data set, without its files."""
    splits = []
    for split in (dataset.train, dataset.test):
        assert isinstance(split, data.ImageStream)
        order = np.arange(split.size)
        (batch,) = split.read(
            order,
            split.size,
            None,
            substitute=True,
            finish=lambda pixels: pixels.copy(),
        )
        splits.append(data.Split(batch["image"], batch["label"]))
    return dataset._replace(train=splits[0], test=splits[1])


@pytest.mark.slow
def test_images_in_files_are_pruned_with_like_those_in_memory(tmp_path) -> None:
    source = {"name": "generated_images", "dir": str(tmp_path)}
    sizes = {"image_size": 6, "resize": 7}
    settings = {f"data__{key}": value for key, value in (source | sizes).items()}
    streamed, state = start(**settings)
    loaded = streamed._replace(dataset=in_memory(streamed.dataset))
    stage = streamed.stages[0]
    files, record = prune_state(streamed, state, stage, [])
    memory, expected = prune_state(loaded, state, stage, [])
    for one, other in zip(
        jax.tree.leaves((files.params, files.masks)),
        jax.tree.leaves((memory.params, memory.masks)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert record["train_loss_after"] == expected["train_loss_after"]


@pytest.mark.slow
def test_true_fisher_of_images_in_files_is_the_same_each_time(tmp_path) -> None:
    plan, state = start(
        prune__true_fisher=True,
        data__name="generated_images",
        data__dir=str(tmp_path),
        data__image_size=6,
        data__resize=7,
    )
    samples = fisher_batch(plan, plan.config.prune, state, 0)
    first, again = ([batch["label"] for batch in samples] for _ in range(2))
    given = [batch["label"] for batch in fisher_batch(plan, small().prune, state, 0)]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert (np.concatenate(first) != np.concatenate(given)).any()


@pytest.mark.parametrize("redraw", [True, False])
def test_samples_are_redrawn_or_cached(redraw: bool) -> None:
    plan, state = start(prune__redraw_samples=redraw, prune__recompute=2)
    pruner = plan.config.prune
    draws = [
        fisher_batch(plan, pruner, state, draw, again)
        for draw in range(2)
        for again in range(3)
    ]
    images = {draw["image"].tobytes() for draw in draws if draw is not None}
    assert len(images) == (6 if redraw else 1)


def test_methods_by_magnitude_need_an_example_for_macs_only() -> None:
    plan, state = start(prune__method="globalmagni")
    assert fisher_batch(plan, plan.config.prune, state, 0) is None
    plan, state = start(prune__method="globalmagni", prune__flops_power=0.3)
    batch = fisher_batch(plan, plan.config.prune, state, 0)
    assert batch is not None
    assert len(batch["label"]) == 1


def test_weight_decay_is_added_to_the_damping_if_the_config_says_so() -> None:
    for given, expected in ((False, 0.0), (True, 1e-4)):
        config = small(prune__damping_plus_weight_decay=given)
        assert step_options(config, config.prune).method.weight_decay == expected


@pytest.mark.slow
def test_label_smoothing_changes_the_fisher() -> None:
    pruned = []
    for smoothing in (0.0, 0.3):
        plan, state = start(prune__label_smoothing=smoothing)
        new, record = prune_state(plan, state, Stage(0, 0.5, "prune"), [])
        pruned.append((np.asarray(new.params["fc1"]["kernel"]), record))
    assert (pruned[0][0] != pruned[1][0]).any()
    assert pruned[0][1]["train_loss_before"] != pruned[1][1]["train_loss_before"]


def test_a_step_leaves_the_weights_of_other_pruners() -> None:
    plan, state = start(prune__prunable="fc1", prune_2={"prunable": "fc2"})
    new, record = prune_state(plan, state, Stage(0, 0.5, "prune_2"), [])
    np.testing.assert_array_equal(
        new.params["fc1"]["kernel"], state.params["fc1"]["kernel"]
    )
    assert list(new.masks) == list(state.masks)
    assert np.asarray(new.masks["fc1/kernel"]).all()
    assert record["sparsity"] == pytest.approx(0.5, abs=1e-2)


@pytest.mark.slow
def test_mean_samples_belong_to_methods_of_first_order() -> None:
    plan, state = start(prune__method="woodtaylorblock", prune__mean_samples=400)
    new, _ = prune_state(plan, state, Stage(0, 0.5, "prune"), [])
    other, _ = start(prune__method="woodtaylorblock")
    without, _ = prune_state(other, state, Stage(0, 0.5, "prune"), [])
    assert (new.params["fc1"]["kernel"] != without.params["fc1"]["kernel"]).any()


def test_a_pattern_goes_through_the_config() -> None:
    pruner = {"one_shot": True, "pattern": "2:4", "target_sparsity": 0.5}
    plan, state = start(prune={**pruner, "method": "globalmagni", "loss_samples": 0})
    state, record = prune_state(plan, state, Stage(0, 0.5, "prune"), [])
    assert record["sparsity"] == record["target_sparsity"] == 0.5
    wf.patterns.check(state.params, "2:4")
    wf.patterns.check(state.masks, "2:4")
    plan, state = start(prune={**pruner, "pattern": "2:3", "target_sparsity": 1 / 3})
    with pytest.raises(ConfigError, match=r"prune: .*'2:3'.*64 inputs, no multiple"):
        forecast(plan, {"params": state.params}, state.masks)


def test_losses_are_left_out_with_no_samples_for_them() -> None:
    plan, state = start(prune__loss_samples=0)
    _, record = prune_state(plan, state, Stage(0, 0.5, "prune"), [])
    assert "train_loss_before" not in record


def test_the_forecast_has_each_pruner_that_keeps_gradients() -> None:
    plan, state = start(
        prune__prunable="fc1", prune_2={"prunable": "fc2", "method": "magni"}
    )
    needs = forecast(plan, {"params": state.params}, state.masks)
    assert list(needs) == ["prune"]
    assert needs["prune"].num_weights == 1024


NORMED = {
    "model": {"name": "net"},
    "prune__method": "globalmagni",
    "train__batch_size": 20,
}


@pytest.mark.slow
def test_batch_norm_is_estimated_again_after_a_step() -> None:
    stage = Stage(0, 0.9, "prune")
    plan, state = start(**NORMED, prune__batch_norm_samples=40)
    new, _ = prune_state(plan, state, stage, [])
    frozen, _ = start(**NORMED)
    old, _ = prune_state(frozen, state, stage, [])
    for before, after in zip(
        jax.tree.leaves(old.batch_stats), jax.tree.leaves(new.batch_stats), strict=True
    ):
        assert before.shape == after.shape
        assert (before != after).any()
    for before, after in zip(
        jax.tree.leaves(old.params), jax.tree.leaves(new.params), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_batch_norm_of_a_network_without_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_norm_samples=5.*mlp has no batch"):
        start(prune__batch_norm_samples=5)


def test_macs_on_the_way_start_from_what_there_is() -> None:
    plan, _ = start(prune__flops_target=100e-6, prune__initial_sparsity=0.0)
    pruner = plan.config.prune
    half = Stage(0, 0.8 * (1 - 0.5**3), "prune")
    found = pruning_step._goal(pruner, half, [], 1184.0)
    assert found["flops_target"] == pytest.approx((100 + 1084 / 8) / 1e6)
    earlier = [{"macs_before": 1184.0, "macs": 500.0}]
    assert pruning_step._goal(pruner, half, earlier, 500.0) == found
    last = Stage(0, 0.8, "prune")
    assert pruning_step._goal(pruner, last, earlier, 500.0) == {"flops_target": 100e-6}


MATCHED = {
    "prune__method": "woodtaylor",
    "prune__update": "joint",
    "prune__auto_damping": True,
}


class Unread:
    """A split that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test split was read: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("match", ["none", "outputs", "labels"])
def test_the_test_split_chooses_nothing(match: str) -> None:
    plan, state = start(prune__match=match, prune__diagnostics=True, **MATCHED)
    plan = plan._replace(dataset=plan.dataset._replace(test=Unread()))
    forecast(
        plan, {"params": state.params, "batch_stats": state.batch_stats}, state.masks
    )
    done: list[dict[str, Any]] = []
    for stage in plan.stages[:2]:
        state, record = prune_state(plan, state, stage, done)
        done.append(record)
    assert done[1]["sparsity"] > done[0]["sparsity"] > 0
    assert 0 < done[0]["damping_update"]["multiple"] <= 100
    with pytest.raises(AssertionError, match="the test split was read"):
        _ = plan.dataset.test.images


@pytest.mark.slow
def test_outputs_are_those_of_the_network_before_the_first_step() -> None:
    plan, state = start(prune__match="outputs", **MATCHED)
    first, record = prune_state(plan, state, plan.stages[0], [])
    for path, leaf in leaves_by_path(first.dense["params"]).items():
        np.testing.assert_array_equal(leaf, leaves_by_path(state.params)[path])
    rows = pruning_step._rows(plan, plan.config.prune, first, 1)
    batch = fisher_batch(plan, plan.config.prune, first, 1)
    images = batch["image"]
    difference = predict(plan.model, {"params": state.params}, images) - predict(
        plan.model, {"params": first.params}, images
    )
    np.testing.assert_array_equal(rows.samples["inputs"], images)
    np.testing.assert_allclose(
        rows.targets, np.sum(rows.samples["direction"] * difference, 1), atol=1e-4
    )
    second, _ = prune_state(plan, first, plan.stages[1], [record])
    assert second.dense is first.dense


@pytest.mark.parametrize("augment", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_damping_is_searched_on_examples_that_are_not_the_fishers(
    augment: bool, tmp_path
) -> None:
    source = {"name": "generated_images", "dir": str(tmp_path)}
    sizes = {"image_size": 6, "resize": 7}
    settings = {f"data__{key}": value for key, value in (source | sizes).items()}
    for given in ({}, settings):
        plan, state = start(
            prune__damping_search_samples=40, prune__augment=augment, **given
        )
        pruner = plan.config.prune
        samples = fisher_batch(plan, pruner, state, 1)
        fisher = next(regroup(samples, 1000))["image"]
        held = pruning_step._held_out(plan, pruner, 1)
        assert fisher.shape[0] == 50
        assert held["image"].shape[0] == held["label"].shape[0] == 40
        images = np.concatenate([fisher, held["image"]]).reshape(90, -1)
        assert len(np.unique(images, axis=0)) == 90
        assert pruning_step._held_out(plan, small().prune, 1) is None


@pytest.mark.slow
def test_a_searched_step_keeps_the_damping_of_the_lowest_loss() -> None:
    plan, state = start(
        prune__damping_search_samples=200,
        prune__method="woodfisher",
        prune__update="joint",
        prune__damping=1e-7,
    )
    plan = plan._replace(dataset=plan.dataset._replace(test=Unread()))
    stage = plan.stages[-1]
    new, record = prune_state(plan, state, stage, [])
    trials = record["damping_trials"]
    assert len(trials) >= 2
    assert trials[-1]["measured"] == min(trial["measured"] for trial in trials)
    errors = frozen_errors(plan.model, state.batch_stats)
    held = pruning_step._held_out(plan, plan.config.prune, 0)
    assert float(errors(new.params, held)) == pytest.approx(trials[-1]["measured"])


def test_a_method_without_curvature_searches_no_damping() -> None:
    plan, state = start(prune__damping_search_samples=40, prune__method="globalmagni")
    _, record = prune_state(plan, state, plan.stages[0], [])
    assert "damping_trials" not in record


def test_more_held_out_examples_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"damping_search_samples=5000 beside 50"):
        start(prune__damping_search_samples=5000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prune__damping_search_samples": 9, "prune__match": "outputs", **MATCHED},
            "damping_search_samples=9; expected 0 with match='outputs'",
        ),
        (
            {"prune__damping_search_samples": 9, "prune__recompute": 2},
            "damping_search_samples=9; expected 0 with recompute",
        ),
        ({"prune__damping_search_samples": -1}, "damping_search_samples=-1"),
        ({"prune__match": "outputs"}, "prune.match: .*first order"),
        ({"prune__match": "logits", **MATCHED}, "match.*outputs.*labels"),
        ({"prune__match": "labels", "prune__recompute": 2, **MATCHED}, "recompute"),
        ({"prune__auto_damping": True, "prune__method": "kfac"}, "auto_damping"),
    ],
)
def test_what_does_not_go_with_matching_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_what_a_step_found_is_in_log_and_record(caplog) -> None:
    changes = {"method": "globalmagni", "one_shot": True, "loss_samples": 0}
    plan, state = start(prune={**changes, "target_sparsity": 0.5})
    shrunk = {"kernel": 1e-6 * state.params["fc2"]["kernel"]}
    params = {**state.params, "fc2": {**state.params["fc2"], **shrunk}}
    state = state._replace(params=params)
    with caplog.at_level("INFO"):
        _, record = prune_state(plan, state, Stage(0, 0.5, "prune"), [])
    (text,) = record["warnings"]
    assert "no weight is left of 'fc2/kernel'" in text
    assert text in caplog.messages
    outputs = counted(record["empty_outputs"]["fc2/kernel"], "output")
    assert f"fc2/kernel: {outputs} without a weight left" in caplog.messages
