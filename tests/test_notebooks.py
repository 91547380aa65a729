"""The notebooks run as scripts, with their own assertions, and draw what they say."""

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import woodfisher_jax as wf

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
FIGURES = {
    "1_woodfisher_in_5_minutes": 1,
    "2_what_the_fisher_sees": 5,
    "3_prune_your_own_model": 2,
}


def test_every_notebook_is_here() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def show() -> None:
        """Draws, for the errors that only drawing finds."""
        for number in plt.get_fignums():
            figure = plt.figure(number)
            figure.canvas.draw()
            shown.append(all(axes.has_data() for axes in figure.axes))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    with plt.rc_context({"backend": "Agg"}):
        runpy.run_path(str(path))
    assert shown == [True] * FIGURES[path.stem]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_of_the_package_exist(path: Path) -> None:
    names = set(re.findall(r"\bwf\.([a-z_]\w*)", path.read_text()))
    assert names
    assert {name for name in names if not hasattr(wf, name)} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_in_percent_format(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ---\n# jupyter:\n#   jupytext:\n")
    title = re.search(r"# %% \[markdown\]\n# # (.+)\n", text)
    assert title
    # Prose and code in turn, and something that is checked.
    assert text.count("# %% [markdown]") >= 5
    assert len(re.findall(r"^# %%$", text, re.MULTILINE)) >= 5
    assert re.search(r"^assert |^np\.testing\.", text, re.MULTILINE)
