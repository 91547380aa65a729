"""Histograms of the saliencies on the page of a run."""

from pathlib import Path

import pytest
from read_pages import seen, text_of
from written_runs import STAGE, record_of, write_run


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
    assert "weights by saliency, nats" in found.figure("prune 1, to 50.00 %")
    # The magnitude alone needs no gradients, hence no memory plan.
    assert "weights by magnitude |w|" in found.figure("prune_2 2, to 50.00 %")
