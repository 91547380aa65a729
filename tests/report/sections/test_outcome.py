"""The top of a page says how the run went."""

from pathlib import Path

from read_pages import seen
from written_runs import write_run


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
