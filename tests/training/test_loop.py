"""The loop end to end on real digits: what it leaves, resumes and refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from read_pages import Page
from saved_runs import random_network
from small_runs import run, small

from woodfisher_jax.evaluate import evaluate_run
from woodfisher_jax.report import metrics
from woodfisher_jax.training import loop as train
from woodfisher_jax.training.config import Config, ConfigError, to_dict
from woodfisher_jax.training.network.train_step import Metrics
from woodfisher_jax.training.resuming import checkpoint
from woodfisher_jax.training.resuming.preemption import Stopped, StopRequest
from woodfisher_jax.training.resuming.saved_run import read_config
from woodfisher_jax.training.start import fit, prepare
from woodfisher_jax.weights.files import save_safetensors
from woodfisher_jax.weights.state_dicts import to_state_dict


def quiet(label: str, done: int, total: int) -> None:
    """Shows no progress."""


def saved(workdir: Path, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the log of the latest checkpoint."""
    plan, (variables, masks) = prepare(config, quiet)
    params = variables["params"]
    target = {
        "params": params,
        "masks": masks,
        "opt_state": plan.train.tx.init(params),
        "batch_stats": {},
    }
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        arrays, meta = checkpoint.restore(manager, None, target)
    return arrays, meta["log"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody interrupted."""
    workdir = tmp_path_factory.mktemp("run") / "nested" / "workdir"
    return workdir, train.run(small(), workdir)


def test_results_keep_the_contract(finished: tuple[Path, dict]) -> None:
    workdir, returned = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results["method"] == "woodfisherblock"
    assert results["target_sparsity"] == 0.8
    prunable = 64 * 16 + 16 * 10
    assert results["prunable"] == prunable
    assert results["nonzero"] == prunable * 2 // 10
    assert 0.8 <= results["sparsity"] < 0.8 + 1 / prunable
    for side in ("dense", "final"):
        assert 50 < results[side]["top1"] <= results[side]["top5"] <= 100
        assert results[side]["loss"] > 0
    assert [s["epoch"] for s in results["stages"]] == [2, 3, 4]
    levels = [0.3, 0.8 - 0.5 / 8, 0.8]
    np.testing.assert_allclose(
        [s["target_sparsity"] for s in results["stages"]], levels
    )
    for stage in results["stages"]:
        parts = [stage[f"seconds_{p}"] for p in ("gradients", "curvature", "update")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= stage["seconds"]
        assert {"step", "sparsity", "top1_before", "top1_after"} <= stage.keys()
        counts = stage["saliency_histogram"]
        kept = round(prunable * (1 - stage["sparsity"]))
        assert sum(counts["kept"]) + counts["zeros"][0] == kept
    assert results["peak_rss_bytes"] > 1e8
    assert results["device"]["platform"] == jax.default_backend()
    assert "jax" in results["versions"]
    assert results["seed"] == 0
    assert results["config"] == json.loads((workdir / "config.json").read_text())
    assert results["seconds_total"] > 0
    assert returned["final"] == results["final"]


def test_each_column_of_the_metrics_is_documented(finished: tuple[Path, dict]) -> None:
    workdir, results = finished
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    table = page.partition("### Columns of")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)
    paths = [f"sparsity/{path}" for path in results["sparsity_by_path"]]
    header = (workdir / "metrics.csv").read_text().partition("\n")[0]
    assert [*documented[:-1], *paths] == header.split(",")
    assert documented[-1] == "sparsity/PATH"


def test_everything_is_in_the_workdir(finished: tuple[Path, dict]) -> None:
    workdir, _ = finished
    for name in ("accuracy.png", "sparsity.png", "metrics.csv", "log.txt"):
        assert (workdir / name).stat().st_size > 100, name
    assert list((workdir / "tensorboard").iterdir())
    page = Page((workdir / "report.html").read_text())
    assert page.row("prune 3")[3] == "80.00 %"
    rows = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [(r["event"], r["epoch"]) for r in rows] == [
        ("train", 1),
        ("train", 2),
        ("dense", 2),
        ("prune", 2),
        ("train", 3),
        ("prune", 3),
        ("train", 4),
        ("prune", 4),
        ("train", 5),
    ]
    assert rows[-1]["sparsity/fc1/kernel"] > 0.5
    assert 0 <= rows[-1]["starved"] <= 1


def test_pruned_entries_stay_zero_in_weights_and_momentum(
    finished: tuple[Path, dict],
) -> None:
    arrays, _ = saved(finished[0], small())
    momenta = [
        s.trace
        for s in jax.tree.leaves(
            arrays["opt_state"], is_leaf=lambda s: isinstance(s, optax.TraceState)
        )
        if isinstance(s, optax.TraceState)
    ]
    assert len(momenta) == 1
    for path, mask in arrays["masks"].items():
        layer, leaf = path.split("/")
        pruned = ~np.asarray(mask)
        assert pruned.any()
        assert (np.asarray(arrays["params"][layer][leaf])[pruned] == 0).all()
        assert (np.asarray(momenta[0][layer][leaf])[pruned] == 0).all()
        assert (np.asarray(arrays["params"][layer][leaf])[~pruned] != 0).all()


def same_bits(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(
    finished: tuple[Path, dict], tmp_path: Path
) -> None:
    workdir = tmp_path / "killed"
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from woodfisher_jax.training import config, loop\n"
        "values = json.loads(sys.argv[1])\n"
        "loop.run(config.from_dict(values), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(to_dict(small())), str(workdir)]
    # The parent's import path, so that this works in an installed tree and outside.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    child = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        done = [p.name for p in workdir.glob("checkpoints/[0-9]*") if p.name.isdigit()]
        # 2 epochs of 22 steps, the dense network and the first pruning step.
        if done and max(map(int, done)) >= 46:
            break
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert not (workdir / "results.json").exists()
    results = run(small(), workdir)
    same_bits(saved(workdir, small())[0], saved(finished[0], small())[0])
    assert results["final"] == finished[1]["final"]
    rows = (workdir / "metrics.jsonl").read_text().split("\n")
    assert len(rows) == len((finished[0] / "metrics.jsonl").read_text().split("\n"))


def interrupted(config: Config, workdir: Path, stop_after: int) -> None:
    """Runs until a number of checkpoints are saved."""
    saves, save = [], checkpoint.save

    def stopping(*arguments: Any) -> None:
        if len(saves) == stop_after:
            raise KeyboardInterrupt
        saves.append(None)
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_an_exception_at_any_point_loses_nothing(
    finished: tuple[Path, dict], tmp_path: Path, stop_after: int
) -> None:
    interrupted(small(), tmp_path, stop_after)
    run(small(), tmp_path)
    same_bits(saved(tmp_path, small())[0], saved(finished[0], small())[0])


def stopped(config: Config, workdir: Path, number: int, *, after: int) -> Stopped:
    """Runs, with a signal from outside after that many steps."""
    finish_step = train.finish_step

    def interrupted(step: int, metrics: Metrics, log: Any) -> bool:
        if step == after:
            os.kill(os.getpid(), number)
        return finish_step(step, metrics, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish_step", interrupted)
        with pytest.raises(Stopped) as caught:
            run(config, workdir)
    return caught.value


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_resumes_in_the_middle_of_an_epoch(
    finished: tuple[Path, dict], tmp_path: Path
) -> None:
    # Of the dense network's first epoch, then between two pruning steps.
    error = stopped(small(), tmp_path, signal.SIGTERM, after=8)
    assert error.exit_code == 0
    assert f"which is saved in {tmp_path}" in str(error)
    (event,) = checkpoint_events(tmp_path)
    assert 9 <= event <= 12
    error = stopped(small(), tmp_path, signal.SIGINT, after=50)
    assert error.exit_code == 130
    event = checkpoint_events(tmp_path)[-1]
    assert 53 <= event <= 56
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        # Nobody has judged the network there.
        assert checkpoint.best_event(manager) == 46
        log = checkpoint.restore(manager, event, {})[1]["log"]
    assert len(log["losses"]) == log["step"] - 44
    assert not (tmp_path / "results.json").exists()
    results = run(small(), tmp_path)
    same_bits(saved(tmp_path, small())[0], saved(finished[0], small())[0])
    assert results["final"] == finished[1]["final"]
    kept = ("event", "epoch", "step", "train_loss", "top1", "loss")
    rows = [
        [{key: row.get(key) for key in kept} for row in metrics.read_metrics(folder)]
        for folder in (tmp_path, finished[0])
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_an_averaged_network_is_judged_pruned_and_resumed(tmp_path: Path) -> None:
    changes = {"dense__average_decay": 0.9, "train__average_decay": 0.9}
    config = small(dense__epochs=1, train__epochs=1, prune__end=0, **changes)
    whole = run(config, tmp_path / "whole")
    assert whole["final"] == {
        key: evaluate_run(tmp_path / "whole")[key] for key in ("top1", "top5", "loss")
    }
    stopped(config, tmp_path / "cut", signal.SIGTERM, after=30)
    again = run(config, tmp_path / "cut")
    assert again["final"] == whole["final"]


@pytest.mark.slow
def test_a_small_network_is_trained_resumed_and_evaluated(tmp_path: Path) -> None:
    variables, _ = random_network("mlp", (8, 8, 1), 0.0, hidden=(9,))
    file = tmp_path / "small.safetensors"
    save_safetensors(file, to_state_dict(variables), {})
    config = small(init_from=str(file), train__epochs=1, prune__end=0)
    whole = run(config, tmp_path / "whole")
    assert read_config(tmp_path / "whole").model.settings["widths"] == {"fc1": 9}
    interrupted(config, tmp_path / "cut", 2)
    again = run(config, tmp_path / "cut")
    fitted = fit(config)[0]
    same_bits(
        *(saved(tmp_path / folder, fitted)[0] for folder in ("cut", "whole")),
    )
    found = evaluate_run(tmp_path / "cut")
    for key, value in whole["final"].items():
        assert again["final"][key] == value == found[key]
    assert found["prunable"] == 9 * 64 + 9 * 10


def test_a_finished_run_started_again_changes_nothing(
    finished: tuple[Path, dict],
) -> None:
    workdir, results = finished
    before = (workdir / "metrics.csv").read_text()
    again = run(small(), workdir)
    assert again["final"] == results["final"]
    assert (workdir / "metrics.csv").read_text() == before


def test_a_damaged_save_and_lost_metrics_are_made_again(
    finished: tuple[Path, dict], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    expected = (workdir / "metrics.csv").read_text()
    (workdir / "metrics.csv").unlink()
    run(small(), workdir)
    assert (workdir / "metrics.csv").read_text() == expected
    latest = workdir / "checkpoints" / str(checkpoint_events(workdir)[-1])
    meta = latest / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"step": ', '"step": 1', 1))
    run(small(), workdir)
    same_bits(saved(workdir, small())[0], saved(finished[0], small())[0])
    said = (workdir / "log.txt").read_text()
    assert f"the save {latest} is damaged (SHA256SUMS does not match" in said
    assert latest.with_suffix(".damaged").is_dir()


def test_a_workdir_of_another_config_is_refused(finished: tuple[Path, dict]) -> None:
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"config\.seed is 0 there, 7 here"):
        run(small(seed=7), workdir)
    assert (workdir / "config.json").read_text() == before


def test_one_shot_prunes_once_and_does_not_retrain(tmp_path: Path) -> None:
    results = run(small(prune__one_shot=True), tmp_path)
    assert [s["target_sparsity"] for s in results["stages"]] == [0.8]
    assert results["final"]["top1"] == results["stages"][0]["top1_after"]
    assert results["dense"]["top1"] == results["stages"][0]["top1_before"]


@pytest.mark.slow
def test_a_schedule_in_steps_may_prune_within_an_epoch(tmp_path: Path) -> None:
    config = small(
        prune__unit="steps", prune__start=5, prune__end=30, prune__frequency=10
    )
    results = run(config, tmp_path)
    first = 2 * 22
    assert [s["step"] - first for s in results["stages"]] == [5, 15, 25, 30]
    # Each stage has the accuracy it starts from in the history, for the plot.
    rows = metrics.read_metrics(tmp_path)
    for stage in results["stages"]:
        here = [row for row in rows if row["step"] == stage["step"]]
        assert [row["event"] for row in here] == ["train", "prune"]
        assert here[0]["top1"] == stage["top1_before"]
    assert results["sparsity"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        "magni",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("woodfisher", "diagfisher", "globalmagni")
        ),
    ],
)
def test_each_method_runs(tmp_path: Path, method: str) -> None:
    config = small(prune__method=method, dense__epochs=1, train__epochs=0, prune__end=0)
    results = run(config, tmp_path)
    assert results["sparsity"] == pytest.approx(0.8, abs=1e-3)


TWO = {
    "dense__epochs": 1,
    "train__epochs": 2,
    "train__optimizer": {"name": "adamw"},
    "prune__prunable": "fc1",
    "prune__end": 1,
    "prune_2": {"prunable": "fc2", "method": "magni", "target_sparsity": 0.5},
}


@pytest.mark.slow
def test_two_pruners_prune_their_own_weights_and_resume(tmp_path: Path) -> None:
    config = small(**TWO)
    whole = run(config, tmp_path / "whole")
    steps = [(s["pruner"], s["epoch"]) for s in whole["stages"]]
    names = ["prune", "prune_2"]
    assert steps == [(name, epoch) for epoch in (1, 2) for name in names]
    assert whole["sparsity_by_path"] == pytest.approx(
        {"fc1/kernel": 0.8, "fc2/kernel": 0.5}, abs=1e-3
    )
    assert whole["method"] == "woodfisherblock + magni"
    expected = (0.8 * 1024 + 0.5 * 160) / 1184
    assert whole["target_sparsity"] == pytest.approx(expected)
    # After the first of two pruners that share a step.
    interrupted(config, tmp_path / "cut", 3)
    again = run(config, tmp_path / "cut")
    same_bits(saved(tmp_path / "cut", config)[0], saved(tmp_path / "whole", config)[0])
    assert again["final"] == whole["final"]


@pytest.mark.slow
def test_repeated_one_shot_prunes_in_turn_and_trains_after(tmp_path: Path) -> None:
    config = small(
        dense__epochs=1,
        train__epochs=1,
        prune__repeated_one_shot=True,
        prune__end=3,
        prune__degree=1.0,
        prune__initial_sparsity=0.5,
    )
    results = run(config, tmp_path)
    levels = [stage["sparsity"] for stage in results["stages"]]
    assert levels == pytest.approx([0.5, 0.6, 0.7, 0.8], abs=2e-3)
    assert {stage["epoch"] for stage in results["stages"]} == {1}
    before, after = (
        [stage[f"top1_{side}"] for stage in results["stages"]]
        for side in ("before", "after")
    )
    assert before[1:] == after[:-1]
    assert metrics.read_metrics(tmp_path)[-1]["event"] == "train"


@pytest.mark.slow
def test_repeated_one_shot_from_dense_is_each_one_shot(tmp_path: Path) -> None:
    changes = {"dense__epochs": 1, "train__epochs": 0, "prune__redraw_samples": False}
    turns = {
        "prune__repeated_one_shot": True,
        "prune__from_dense": True,
        "prune__end": 1,
        "prune__initial_sparsity": 0.5,
    }
    config = small(**changes, **turns)
    interrupted(config, tmp_path / "turns", 3)
    turns = run(config, tmp_path / "turns")
    for number, sparsity in enumerate((0.5, 0.8)):
        once = {
            "prune__one_shot": True,
            "prune__target_sparsity": sparsity,
            "prune__initial_sparsity": 0.0,
        }
        alone = run(small(**changes, **once), tmp_path / f"{sparsity}")
        for key in ("top1_before", "top1_after", "train_loss_after"):
            assert turns["stages"][number][key] == alone["stages"][0][key]
    same_bits(
        saved(tmp_path / "turns", config)[0]["params"],
        saved(tmp_path / "0.8", config)[0]["params"],
    )


@pytest.mark.slow
def test_losses_and_diagnostics_are_in_the_results(tmp_path: Path) -> None:
    config = small(
        prune__one_shot=True, prune__diagnostics=True, prune__loss_path_steps=3
    )
    (stage,) = train.run(config, tmp_path)["stages"]
    path = stage["loss_path"]
    assert path["fractions"] == [0, 1 / 3, 2 / 3, 1]
    assert path["train"][0] == stage["train_loss_before"]
    assert path["train"][-1] == pytest.approx(stage["train_loss_after"], rel=1e-4)
    assert len(path["test"]) == len(path["quadratic"]) == 4
    model = path["with_slope"][-1] - path["with_slope"][0]
    # The method's own Fisher has the damping and no blocks that meet.
    assert stage["predicted_loss_increase"] > 0
    assert model > 0
    assert 0 < stage["magnitude_overlap"] < 1
    assert stage["fisher_trace"].keys() == {"fc1/kernel", "fc2/kernel"}
    assert (tmp_path / "loss_path_1.png").stat().st_size > 1000


def test_multiply_accumulates_are_in_the_results(finished: tuple[Path, dict]) -> None:
    workdir, results = finished
    assert results["macs"]["dense"] == 64 * 16 + 16 * 10
    assert results["macs"]["sparse"] == results["nonzero"]
    assert [row["path"] for row in results["layers"]] == ["fc1/kernel", "fc2/kernel"]
    assert results["stages"][-1]["macs"] == results["nonzero"]
    assert (workdir / "layers.csv").read_text().startswith("path,size,nonzero")


@pytest.mark.slow
def test_macs_can_be_the_target_of_a_schedule(tmp_path: Path) -> None:
    """1,184 to 200 multiply-accumulates, from those at the first step's sparsity."""
    target = 200e-6
    config = small(
        dense__epochs=1,
        train__epochs=2,
        prune__method="woodfisherblock_flops",
        prune__flops_target=target,
    )
    results = run(config, tmp_path)
    first = results["stages"][0]["macs"]
    assert results["stages"][0]["sparsity"] == pytest.approx(0.3, abs=1e-3)
    way = [200 + (first - 200) * (1 - t / 2) ** 3 for t in (0, 1, 2)]
    assert [s["macs"] for s in results["stages"]] == pytest.approx(way, abs=1)
    assert results["target_sparsity"] is None
    assert results["macs"]["sparse"] == 200


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    # 1 is saved after the first epoch of 22 steps; the second phase explodes.
    config = small(train__learning_rate=1e30, dense__epochs=1)
    with pytest.raises(train.DivergedError) as caught:
        run(config, tmp_path)
    message = str(caught.value)
    assert "training loss is" in message
    assert "at step 2" in message
    assert "learning_rate" in message
    folder = tmp_path / "checkpoints" / "24"
    assert f"The last checkpoint is {folder} (epoch 1, step 22, after prun" in message
    assert checkpoint_events(tmp_path)[-1] == 24


def checkpoint_events(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def test_weight_decay_goes_off_after_the_last_pruning_step() -> None:
    config = small(train__weight_decay_after_pruning=False)
    plan, (variables, masks) = prepare(config, quiet)
    params = variables["params"]
    seen = []

    def step(state: Any, batch: Any, stop: Any, *, tx: Any, **rest: Any) -> Any:
        seen.append(tx is plan.train.tx)
        return state, Metrics(jnp.ones(()), jnp.zeros(()))

    log = train.Log(step=plan.train.first_step)
    state = train.TrainState(params, {}, masks, plan.train.tx.init(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step)
        log.stages = [{"pruner": "prune"}]
        train.train_segment(plan, state, log, StopRequest())
        assert all(seen)
        seen.clear()
        log.stages = [{"pruner": "prune"}] * 3
        train.train_segment(plan, state, log, StopRequest())
        assert not any(seen)


def test_compiled_programs_go_where_the_config_says(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    config = small(compile_cache_dir=str(tmp_path / "cache"))
    try:
        with pytest.raises(ConfigError, match="cannot be used"):
            run(config, tmp_path / "file" / "run")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("folder", "known", "kept"),
    [
        ("auto", None, "cache/woodfisher_jax/compiled"),
        ("auto", "known", "known"),
        ("own", "known", "own"),
        (None, None, None),
    ],
)
def test_compiled_programs_are_kept_for_the_next_run(
    folder, known, kept, tmp_path, monkeypatch
) -> None:
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = lambda name: name and str(tmp_path / name)  # noqa: E731
    jax.config.update(names[0], place(known))
    try:
        train.keep_compiled(folder if folder == "auto" else place(folder))
        assert jax.config.jax_compilation_cache_dir == place(kept)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_predicate_that_selects_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selects none.*fc1/kernel"):
        run(small(prune__prunable="nothing"), tmp_path)
    # The folder is not taken: the corrected config may use it.
    run(small(prune__one_shot=True, dense__epochs=1), tmp_path)


def test_a_folder_that_was_there_stays_after_a_failed_start(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for folder in (new, old):
        with pytest.raises(ConfigError, match=r"config\.data"):
            train.run(small(data__name="nothing"), folder)
    assert not new.exists()
    assert old.exists()
