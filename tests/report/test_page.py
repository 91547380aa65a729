"""The page of a run is right for every way a run can go."""

import html
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from read_pages import Page
from small_runs import small
from written_runs import DEFAULTS, LAYERS, STAGE, record_of, rows_of, write_run

from woodfisher_jax.report import page
from woodfisher_jax.report.figures import Picture
from woodfisher_jax.report.page import pictures, run_page, write_page
from woodfisher_jax.report.quantities import NONE
from woodfisher_jax.report.record import RunRecord
from woodfisher_jax.training.config import Config, from_dict, to_dict
from woodfisher_jax.training.config.files import load_config

PREDICTED = STAGE | {
    "predicted_loss_increase": 0.2,
    "gradient_term": 0.01,
    "magnitude_overlap": 0.75,
}
PATH = {
    "fractions": [0.0, 0.5, 1.0],
    "train": [0.25, 0.3, 0.5],
    "test": [],
    "quadratic": [0.25, 0.28, 0.4],
    "with_slope": [0.25, 0.29, 0.45],
}
LATENCY = {
    "processor": "a processor",
    "cores": 2,
    "sparsity": 0.9,
    "products": [
        {"batch_size": 1, "device": "cpu", "dense": 2.0, "bcoo": 6.0, "csr": 0.5},
        {"batch_size": 64, "device": "cpu", "dense": 2.0, "bcoo": 2.02, "csr": 4.0},
    ],
}


def undrawn(picture: Picture) -> str:
    return f'<svg role="img" aria-label="{html.escape(picture.words)}"></svg>'


def text_of(record: RunRecord) -> str:
    """The page; its figures are made, but not drawn, which takes most of the time."""
    with patch.object(Picture, "svg", undrawn):
        return run_page(record, pictures(record))


def seen(folder: Path) -> Page:
    return Page(text_of(record_of(folder)))


def titles(found: Page) -> list[str]:
    return [words.partition(":")[0] for words in found.figures]


def figure(found: Page, title: str) -> str:
    return next(words for words in found.figures if words.startswith(f"{title}:"))


# ------------------------------------------------------------------ how a run went


def test_a_run_and_what_it_was_compared_with(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my run")
    write_run(folder / "compare-globalmagni", top1=85.5, prune__method="globalmagni")
    found = Page(write_page(folder, DEFAULTS).read_text())
    assert found.words.count("woodfisherblock on digits: my run") == 2
    assert "mlp on digits, pruned by woodfisherblock in one step until 50.00 %" in (
        found.text
    )
    assert found.row("woodfisherblock") == (
        ["woodfisherblock", "50.00 %", "88.00", "99.00", "0.1200", "2.00"]
    )
    assert found.row("globalmagni")[2] == "85.50"
    assert found.row("globalmagni")[5] == "4.50"
    for words in ("40 of 80 weights left", "1.23 GB", "of 80, for one image", "20.0 s"):
        assert words in found.text
    accuracy = figure(found, "Accuracy and sparsity")
    assert "woodfisherblock: 5 points, 70 at 1, 88 at 3, lowest 70" in accuracy
    assert "globalmagni, just pruned: 1 point, 81 at 2" in accuracy
    assert "not finished" not in found.text
    assert titles(found) == [
        "Accuracy and sparsity",
        "Loss",
        "Sparsity of the layers",
        "Multiply-accumulates",
        "prune 1, to 50.00 %",
        "Time",
    ]
    # The plots are beside the page, and not beside a page elsewhere.
    written = {path.name for path in folder.glob("*.png")}
    assert written == {"comparison.png", "sparsity.png"}
    write_page(folder / "compare-globalmagni", DEFAULTS, tmp_path / "page.html")
    assert not list((folder / "compare-globalmagni").glob("*.png"))


def test_the_line_a_pruning_step(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, stages=[STAGE, STAGE]))
    assert found.row("prune 2") == (
        ["prune 2", "2", "40", "50.00 %", "50.00 %", "90.00", "81.00", "4.0 s"]
    )


def test_what_a_step_found_is_said(tmp_path: Path) -> None:
    found = {"warnings": ["no weight is left of 'fc/kernel'"], "untouched": {"a": 0.25}}
    page = seen(write_run(tmp_path, stages=[STAGE, STAGE | found]))
    assert "Step 2: no weight is left of 'fc/kernel'." in page.text
    assert page.row("a") == ["a", "25.00 %", "0"]


def test_a_constant_accuracy_of_all_is_drawn_below_100(tmp_path: Path) -> None:
    rows = [row | {"top1": 100.0, "loss": 0.0} for row in rows_of(100.0, [STAGE])]
    picture = pictures(record_of(write_run(tmp_path, rows=rows)))["accuracy"]
    upper, lower = picture.figure.axes
    assert 0 <= upper.get_ylim()[0] < upper.get_ylim()[1] == 100
    assert lower.get_ylim() == (0, 100)


def test_one_shot_without_training_has_bars(tmp_path: Path) -> None:
    rows = [r for r in rows_of(81.0, [STAGE]) if r["event"] in ("dense", "prune")]
    changes: dict[str, Any] = {"rows": rows, "dense__epochs": 0}
    folder = write_run(tmp_path, **changes)
    write_run(folder / "compare-magni", **changes, prune__method="magni")
    found = seen(tmp_path)
    assert "Nothing was trained here" in found.text
    assert "initial weights, not trained" in found.text
    assert "dense: 90.00; pruned, 50.0 %: 81.00" in figure(found, "Accuracy")
    axes = pictures(record_of(tmp_path))["comparison"].figure.axes[0]
    assert axes.get_xlim() == (0, 100)
    (other,) = axes.get_lines()
    assert list(other.get_xdata()) == [90, 81]


def test_a_network_from_elsewhere(tmp_path: Path) -> None:
    folder = write_run(tmp_path, init_from="a <b>.ckpt")
    assert "Dense: from a <b>.ckpt." in seen(folder).text


def test_nothing_pruned(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, stages=[]))
    assert "mlp on digits, seed 0; nothing was pruned." in found.text
    assert found.text.count("No pruning step has been done.") == 2


def test_a_run_that_has_not_finished_says_so(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, finished=False))
    assert "it has reached epoch 3, step 60, with 1 pruning step done" in found.text
    assert "Top-1, so far" in found.text
    assert "are counted when the run ends" in found.text


def test_a_run_that_has_only_started(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, finished=False, rows=[]))
    for words in (
        "it has not reached the end of an epoch yet",
        "nothing is pruned yet",
        "The dense network has not been evaluated yet.",
        "No epoch and no pruning step has ended yet.",
    ):
        assert words in found.text


def test_losses_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = rows_of(88.0, [STAGE])
    rows[3]["loss"] = math.nan
    found = seen(write_run(tmp_path, rows=rows))
    assert "woodfisherblock: 4 points, 0.3 at 1" in figure(found, "Loss")
    nowhere = [row | {"loss": None} for row in rows]
    assert "Loss" not in titles(seen(write_run(tmp_path, rows=nowhere)))


def test_an_old_run_without_newer_fields(tmp_path: Path) -> None:
    keys = ("pruner", "epoch", "step", "sparsity", "top1_before", "top1_after")
    found = seen(write_run(tmp_path, stages=[{key: STAGE[key] for key in keys}]))
    assert found.row("prune 1")[3:5] == [NONE, "50.00 %"]
    assert "has recorded the saliencies" in found.text


def test_names_from_config_and_path_are_text(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>&\"'"
    folder = tmp_path / hostile
    paths = {f"{hostile}/kernel": 0.5}
    layers = [LAYERS[0] | {"path": f"{hostile}/kernel"}]
    write_run(
        folder,
        data__dir=hostile,
        init_from=hostile,
        results={"sparsity_by_path": paths, "layers": layers},
    )
    (folder / "command.txt").write_text(hostile)
    found = Page(write_page(folder, DEFAULTS).read_text())
    assert found.text.count(hostile) > 5


def test_two_pruners_have_their_own_steps(tmp_path: Path) -> None:
    further = {"method": "globalmagni", "target_sparsity": 0.5, "prunable": "fc2"}
    bare = {key: STAGE[key] for key in STAGE if key != "store"}
    folder = write_run(
        tmp_path,
        stages=[STAGE, bare | {"pruner": "prune_2"}],
        prune_2=further,
        results={"method": "woodfisherblock + globalmagni"},
    )
    found = seen(folder)
    assert found.row("prune_2 2")[2] == "40"
    assert "weights by saliency, nats" in figure(found, "prune 1, to 50.00 %")
    # The magnitude alone needs no gradients, hence no memory plan.
    assert "weights by magnitude |w|" in figure(found, "prune_2 2, to 50.00 %")


# ---------------------------------------------------------------------------- layers


def test_layers_are_in_the_order_of_the_network(tmp_path: Path) -> None:
    order = ["stem", "blocks2/mlp", "blocks10/mlp", "head"]
    layers = [LAYERS[0] | {"path": f"{name}/kernel"} for name in order]
    levels = {f"{name}/kernel": 0.5 for name in sorted(order)}
    for given, expected in ((layers, order), ([], [*order[1:], order[0]])):
        results = {"sparsity_by_path": levels, "layers": given}
        folder = write_run(tmp_path, results=results)
        picture = pictures(record_of(folder))["sparsity"]
        names = [text.get_text() for text in picture.figure.axes[0].texts[::2]]
        assert names == expected


def test_the_table_of_the_layers(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path))
    assert found.row("fc1") == ["fc1", "60", "20", "66.67 %", "60", "20"]
    assert found.row("all") == ["all", "80", "40", "50.00 %", "80", "40"]
    assert "fc1: 20 of 60; fc2: 20 of 20" in figure(found, "Multiply-accumulates")


def test_macs_that_could_not_be_counted(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, results={"macs": None, "layers": []}))
    assert "could not be counted" in found.text
    assert "Table of the layers" not in found.text
    zero = [row | {"dense": 0.0, "sparse": 0.0} for row in LAYERS]
    results = {"macs": {"dense": 0, "sparse": 0}, "layers": zero}
    found = seen(write_run(tmp_path, results=results))
    assert "Table of the layers" in found.text
    assert "Multiply-accumulates" not in titles(found)


# --------------------------------------------------------------------- pruning steps


@pytest.mark.parametrize(("number", "folded"), [(1, 0), (3, 0), (5, 3)])
def test_histograms_first_and_last_in_sight(
    tmp_path: Path, number: int, folded: int
) -> None:
    text = text_of(record_of(write_run(tmp_path, stages=[STAGE] * number)))
    text = text.partition("Saliencies</h2>")[2].partition("<h2>")[0]
    assert text.count("<svg") == number
    assert text.partition("<details>")[2].count("<svg") == folded
    assert text.count("removed: 40; kept: 40") == number


def test_weights_without_a_saliency_are_counted(tmp_path: Path) -> None:
    zeros = STAGE["saliency_histogram"] | {"zeros": [3, 1200]}
    folder = write_run(tmp_path, stages=[STAGE | {"saliency_histogram": zeros}])
    assert "1,200 removed, 3 kept" in seen(folder).text


def test_predicted_beside_measured(tmp_path: Path) -> None:
    found = seen(write_run(tmp_path, stages=[PREDICTED, PREDICTED]))
    table = next(t for t in found.tables if "loss before" in t[0])
    assert table[0][1:] == [
        "loss before",
        "after",
        "increase",
        "predicted",
        "its linear term",
        "sum of saliencies",
        "kept as by magnitude",
    ]
    numbers = ["0.25", "0.5", "0.25", "0.2", "0.01", "0.125", "0.75"]
    assert table[1] == ["prune 1", *numbers]
    words = figure(found, "Increase of the loss")
    assert "measured: 2 points, 0.25 at 1" in words
    assert "predicted: 2 points, 0.2 at 1" in words
    assert "linear outputs:" not in words
    assert "diagnostics=True" not in found.text


def test_magnitude_is_predicted_by_linear_outputs(tmp_path: Path) -> None:
    stage = STAGE | {"train_loss_predicted": 0.375}
    found = seen(write_run(tmp_path, stages=[stage, stage]))
    table = next(t for t in found.tables if "loss before" in t[0])
    column = table[0].index("predicted by linear outputs")
    assert table[1][column] == "0.125"
    words = figure(found, "Increase of the loss")
    assert "by linear outputs: 2 points, 0.125 at 1" in words
    assert "diagnostics=True" not in found.text


def test_what_was_not_predicted_says_how(tmp_path: Path) -> None:
    bare = {k: v for k, v in STAGE.items() if not k.startswith("train_loss")}
    found = seen(write_run(tmp_path, stages=[bare]))
    assert "--config.prune.diagnostics=True" in found.text
    # Losses that were not measured have no columns.
    assert ["", "sum of saliencies"] in [table[0] for table in found.tables]


def test_the_loss_along_each_step(tmp_path: Path) -> None:
    stages = [PREDICTED | {"loss_path": PATH | {"test": [1.0, 1.5, 2.0]}}] * 4
    found = seen(write_run(tmp_path, stages=stages))
    assert sum(title.startswith("Loss along step") for title in titles(found)) == 4
    assert "2 more figures" in found.text
    words = figure(found, "Loss along step 1 (prune)")
    assert "quadratic model: 3 points, 0.25 at 0, 0.4 at 1" in words
    assert "test: 3 points, 1 at 0, 2 at 1" in words
    beyond = PATH | {"train": [0.25, None, 0.5], "quadratic": [None] * 3}
    found = seen(write_run(tmp_path, stages=[PREDICTED | {"loss_path": beyond}]))
    words = figure(found, "Loss along step 1 (prune)")
    assert "training: 2 points" in words
    assert "quadratic model" not in words


def test_a_model_below_zero_is_drawn(tmp_path: Path) -> None:
    path = PATH | {"quadratic": [0.25, 0.0, -1.0]}
    folder = write_run(tmp_path, stages=[PREDICTED | {"loss_path": path}])
    axes = pictures(record_of(folder))["loss_path_1"].figure.axes[0]
    assert axes.get_ylim()[0] == -1
    assert axes.get_xlim() == (0, 1)


# -------------------------------------------------------------- cost, latency, origin


def test_the_phases_add_up_to_the_whole_time(tmp_path: Path) -> None:
    assert page.seconds_of_phases(record_of(write_run(tmp_path))) == {
        "training, dense": 6.0,
        "training, pruned": 3.0,
        "gradients": 1.0,
        "curvature, masks": 2.0,
        "update": 0.5,
        "evaluation after pruning": 0.5,
        "start, tests, saves": 7.0,
    }
    nothing = record_of(write_run(tmp_path, stages=[]))
    assert "update" not in page.seconds_of_phases(nothing)
    unknown = record_of(write_run(tmp_path, results={"seconds_total": None}))
    assert page.seconds_of_phases(unknown) == {}


def test_memory_planned_and_taken(tmp_path: Path) -> None:
    text = seen(write_run(tmp_path)).text
    for words in ("1.23 GB", "9 MB", "8 GB", "4 MB float32, device", "2 x a CPU"):
        assert words in text
    kept_none = seen(write_run(tmp_path, stages=[STAGE | {"store": ""}]))
    assert kept_none.row("prune, gradients")[1] == "none"
    bare = {k: v for k, v in STAGE.items() if k != "store"}
    assert "prune, planned" not in seen(write_run(tmp_path, stages=[bare])).text


def test_latency_measured_or_how_to_measure_it(tmp_path: Path) -> None:
    record = record_of(write_run(tmp_path))
    assert f"woodfisher_jax.report {tmp_path} --latency" in seen(tmp_path).text
    found = Page(text_of(record._replace(latency=LATENCY)))
    assert found.row("1") == ["1", "2", "6", "0.5"]
    assert "a processor, 2 cores" in found.text
    assert "Sparsity then: 90.00 %" in found.text
    assert (
        "One row at a time: BCOO is slower than dense, by a factor of 3.0; CSR is "
        "faster than dense, by a factor of 4.0."
    ) in found.text
    assert (
        "64 rows at a time: BCOO is as fast as dense, to 5 %; CSR is slower than "
        "dense, by a factor of 2.0."
    ) in found.text


def test_forward_passes_of_a_small_network(tmp_path: Path) -> None:
    record = record_of(write_run(tmp_path))
    passes = [
        {
            "batch_size": 64,
            "runtime": "jit",
            "device": "cpu",
            "dense": [6.0, 5.5, 7.0],
            "small": [4.0, 3.0, 4.25],
        }
    ]
    page = Page(text_of(record._replace(latency={**LATENCY, "forward": passes})))
    expected = ["64", "jit, cpu", "6 (5.5 to 7)", "4 (3 to 4.25)", "1.50"]
    assert any(expected in table for table in page.tables)
    assert "medians and quartiles on a processor, 2 cores" in page.text


FURTHER = {
    "target_sparsity": 0.5,
    "prunable": "fc2/kernel",
    "end": 2,
    "method": "globalmagni",
}


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        small(),
        small(
            seed=3,
            compare_with=("globalmagni",),
            dense={"epochs": 1, "optimizer": {"name": "adam", "b1": 0.8}},
            train={"epochs": 3, "schedule": "multistep", "decay_at_epochs": (1, 2)},
            prune__prunable="fc1/kernel",
            prune__block_size=7,
            prune_2=FURTHER,
        ),
    ],
    ids=["defaults", "small", "pruners"],
)
def test_the_config_file_gives_the_config(tmp_path: Path, config: Config) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    path = tmp_path / "config.py"
    path.write_text(page.config_file(record_of(folder)))
    assert from_dict(load_config(str(path))) == config


def test_what_differs_from_the_defaults_is_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path, prune_2=FURTHER)
    found = seen(folder)
    short, whole = (t for t in found.tables if t[0] == ["field", "here", "default"])
    fields = [row[0] for row in short[1:]]
    assert "model.hidden" in fields
    assert "prune.target_sparsity" in fields
    assert "prune_2.target_sparsity" in fields
    assert "prune_2.num_samples" not in fields  # As in the first pruner.
    assert "eval_batch_size" not in fields
    assert ["eval_batch_size", "1000", "1000"] in whole
    marked = text_of(record_of(folder)).count('<tr class="marked">')
    assert marked == len(fields) + 1  # And the sum of the layers.


def test_the_command_and_versions(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "command.txt").write_text("python -m x '<b>'")
    found = seen(folder)
    assert "python -m x '<b>'" in found.text
    assert "def get_config()" in found.text
    assert found.row("woodfisher-jax") == ["woodfisher-jax", "not installed"]
