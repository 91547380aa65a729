"""The page of several runs: curves with bars, a line a group, what was left out."""

from pathlib import Path

from read_pages import Page
from written_runs import STAGE, write_run

from woodfisher_jax.report.comparison import Comparison, compare
from woodfisher_jax.report.comparison_page import comparison_page
from woodfisher_jax.report.quantities import NONE
from woodfisher_jax.report.record import read_record


def grid(folder: Path) -> Comparison:
    """Two methods, two levels, two seeds."""
    records = []
    for method, lift in (("woodfisherblock", 4.0), ("globalmagni", 0.0)):
        for level in (0.5, 0.9):
            for seed in (0, 1):
                run = write_run(
                    folder / f"{method}-{level}-{seed}",
                    top1=90 - 20 * level + lift + 2 * seed,
                    stages=[STAGE | {"sparsity": level}],
                    seed=seed,
                    prune__method=method,
                    prune__target_sparsity=level,
                )
                records.append(read_record(run))
    return compare(records)


def test_curves_and_groups(tmp_path: Path) -> None:
    text = comparison_page(grid(tmp_path))
    found = Page(text)
    assert "8 finished runs in 4 groups" in found.text
    assert "woodfisherblock: 2 points, 85 at 50, 77 at 90" in text
    assert "dense, mean: 90" in text
    groups = found.tables[0]
    assert [row[:3] for row in groups[1:]] == [
        ["globalmagni", "50.00 %", "2"],
        ["globalmagni", "90.00 %", "2"],
        ["woodfisherblock", "50.00 %", "2"],
        ["woodfisherblock", "90.00 %", "2"],
    ]
    assert groups[1][5] == "81.00 ± 1.41"
    # Two curves in the first chart, each with bars at both of its points.
    first = text.split('<svg class="chart"')[1].partition("</svg>")[0]
    assert first.count("h10") == 2 * 4


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    whole = read_record(write_run(tmp_path / "whole"))
    again = read_record(write_run(tmp_path / "again"))
    half = read_record(write_run(tmp_path / "half <b>", finished=False))
    other = read_record(write_run(tmp_path / "other", model={"name": "cifarnet"}))
    found = Page(comparison_page(compare([whole, again, half, other])))
    assert f"Not finished, and left out of all means: {half.folder}." in found.text
    assert f"same config and seed is there: {again.folder}." in found.text
    assert "several models: cifarnet, mlp" in found.text
    assert found.row(str(half.folder))[-1] == "not finished"


def test_with_no_run_finished_there_is_only_their_list(tmp_path: Path) -> None:
    runs = [
        read_record(write_run(tmp_path / str(n), seed=n, finished=False, rows=[]))
        for n in (0, 1)
    ]
    found = Page(comparison_page(compare(runs)))
    assert "None of them has finished" in found.text
    assert found.row(str(runs[0].folder))[3] == NONE
    assert "Groups" not in found.text
