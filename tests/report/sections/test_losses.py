"""The increase of the loss, predicted and measured, on the page of a run."""

from pathlib import Path

from read_pages import seen
from written_runs import STAGE, record_of, write_run

from woodfisher_jax.report.page import pictures

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
    words = found.figure("Increase of the loss")
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
    words = found.figure("Increase of the loss")
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
    assert sum(title.startswith("Loss along step") for title in found.titles) == 4
    assert "2 more figures" in found.text
    words = found.figure("Loss along step 1 (prune)")
    assert "quadratic model: 3 points, 0.25 at 0, 0.4 at 1" in words
    assert "test: 3 points, 1 at 0, 2 at 1" in words
    beyond = PATH | {"train": [0.25, None, 0.5], "quadratic": [None] * 3}
    found = seen(write_run(tmp_path, stages=[PREDICTED | {"loss_path": beyond}]))
    words = found.figure("Loss along step 1 (prune)")
    assert "training: 2 points" in words
    assert "quadratic model" not in words


def test_a_model_below_zero_is_drawn(tmp_path: Path) -> None:
    path = PATH | {"quadratic": [0.25, 0.0, -1.0]}
    folder = write_run(tmp_path, stages=[PREDICTED | {"loss_path": path}])
    axes = pictures(record_of(folder))["loss_path_1"].figure.axes[0]
    assert axes.get_ylim()[0] == -1
    assert axes.get_xlim() == (0, 1)
