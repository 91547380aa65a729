"""The command writes pages, times products on request, and says what is wrong."""

import csv
import errno
import json
import os
import sys
from pathlib import Path

import pytest
from read_pages import Page
from saved_runs import random_network, save_run
from written_runs import write_run

from woodfisher_jax.report import __main__ as report


def run(*arguments: object) -> None:
    report.cli([str(argument) for argument in arguments])


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_run(tmp_path / "run")
    run(folder)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "88.00" in Page((folder / "report.html").read_text()).text
    run(tmp_path, "--out", tmp_path / "here.html")  # The only one in the folder.
    page = (tmp_path / "here.html").read_text()
    assert page == (folder / "report.html").read_text()


def test_several_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "sweep"
    for seed in (0, 1):
        write_run(sweep / f"seed-{seed}", seed=seed)
    run(sweep)
    written = [sweep / "comparison.html", sweep / "comparison.csv"]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert "2 finished runs in 1 group;" in Page(written[0].read_text()).text
    # A run that is named twice is one; what is named apart goes where one is.
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run("../sweep/seed-0", "../sweep/seed-1", sweep)
    with (here / "comparison.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_run_with_what_it_was_compared_with_is_one_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_run(folder / "compare-magni", prune__method="magni")
    run(folder)
    assert "magni" in Page((folder / "report.html").read_text()).text
    assert not (folder / "comparison.html").exists()


@pytest.mark.slow
def test_latency_is_measured_once_and_kept(tmp_path: Path) -> None:
    network = random_network("mlp", (8, 8, 1), 0.9, hidden=(20,))
    folder = save_run(tmp_path / "run", {"name": "mlp", "hidden": (20,)}, {3: network})
    write_run(folder)
    run(folder, "--latency")
    found = json.loads((folder / "latency.json").read_text())
    assert [one["batch_size"] for one in found["products"]] == [1, 64]
    assert all(one["dense"] > 0 for one in found["products"])
    assert found["sparsity"] == pytest.approx(0.9, abs=0.05)
    run(folder)
    text = Page((folder / "report.html").read_text()).text
    assert "One row at a time: BCOO is" in text


def test_what_cannot_be_written_ends_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    other = write_run(tmp_path / "c", data__name="mnist")
    (tmp_path / "empty").mkdir()
    for arguments, reason in (
        ([tmp_path / "empty"], "has no config.json; give the folder"),
        ([tmp_path / "none"], "there is no such folder"),
        ([one, two, "--latency"], "--latency with 2 runs; give one"),
        ([one, other], "several data sets"),
        ([one, "--out=x.txt"], "a name that ends in .html"),
        ([one, f"--out={tmp_path}/none/x.html"], "there is no folder"),
        ([one, "--latency"], "there is no folder checkpoints"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    page, table = tmp_path / "x.html", tmp_path / "x.csv"
    for there, runs in ((page, [one]), (page, [one, two]), (table, [one, two])):
        there.write_text("mine")
        with pytest.raises(SystemExit) as caught:
            run(*runs, f"--out={page}")
        assert caught.value.code == 2
        assert f"out={there}: there is such a file" in capsys.readouterr().err
        assert there.read_text() == "mine"
        run(*runs, f"--out={page}", "--overwrite")
        assert there.read_text() != "mine"
        page.unlink()
    run(one)
    run(one)  # Its own page is written again.


def test_of_a_folder_that_cannot_be_written_the_page_may_lie_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run")
    written = os.replace

    def closed(source: Path, path: Path) -> None:
        if path.parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        written(source, path)

    monkeypatch.setattr(os, "replace", closed)
    with pytest.raises(SystemExit) as caught:
        run(folder)
    assert caught.value.code == 1
    found = capsys.readouterr().err
    assert "accuracy.png cannot be written: Permission denied" in found
    assert "--out=FILE.html writes the page elsewhere" in found
    run(folder, f"--out={tmp_path / 'x.html'}")


@pytest.mark.parametrize("number", [1, 2])
def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in range(number)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as caught:
        run(*folders)
    assert caught.value.code == 2
    assert "pip install 'woodfisher-jax[report]'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


def test_the_help_describes_both_uses(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("RUN [RUN ...]", "--latency", "comparison.csv", "error bar"):
        assert words in text
