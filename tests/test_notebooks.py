"""The notebooks run as scripts, with their own assertions, and draw what they say."""

import json
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import woodfisher_jax as wf

FOLDER = Path(__file__).parents[1] / "notebooks"
SHOWN = Path(__file__).parents[1] / "docs" / "notebooks"
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
FIGURES = {
    "1_woodfisher_in_5_minutes": 1,
    "2_what_the_fisher_sees": 5,
    "3_prune_your_own_model": 2,
    "4_prune_a_language_model": 1,
}


def test_every_notebook_is_here() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    # What the site shows is what the code prints, but for rounding of other machines.
    # The peak includes what this process already holds.
    printed, kept = (
        re.sub(r"peak memory \d+ MB", "", text)
        for text in (capsys.readouterr().out, texts(path.stem))
    )
    assert NUMBER.sub("", printed).split() == NUMBER.sub("", kept).split()
    numbers = [
        [float(n.replace(",", "")) for n in NUMBER.findall(text)]
        for text in (printed, kept)
    ]
    np.testing.assert_allclose(*numbers, rtol=0.1, atol=0.1)


def cells(name: str) -> list[dict]:
    return json.loads((SHOWN / f"{name}.ipynb").read_text())["cells"]


def texts(name: str) -> str:
    """All that the notebook of the site prints."""
    outputs = [o for cell in cells(name) for o in cell.get("outputs", ())]
    return "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_site_shows_the_notebook(path: Path) -> None:
    """Where this fails, run the two commands of CONTRIBUTING.md under "Notebooks"."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)[1:]
    written = [
        (re.sub(r"^# ?", "", text, flags=re.MULTILINE) if kind else text).strip()
        for kind, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    found = cells(path.stem)
    assert ["".join(cell["source"]).strip() for cell in found] == written
    outputs = [o for cell in found for o in cell.get("outputs", ())]
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data"}
    pictures = [o for o in outputs if "image/png" in o.get("data", ())]
    assert len(pictures) == FIGURES[path.stem]


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
