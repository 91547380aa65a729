"""The examples run; WoodFisher is ahead of magnitude in each (slow, at full length)."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import woodfisher_jax as wf
from woodfisher_jax.masked import prune_masked

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {"equinox_mlp": "equinox"}
SHORT = {
    "flax_linen": (2, 0.9),
    "flax_nnx": (3, 0.9),
    "equinox_mlp": (3, 0.9),
    "plain_dict": (3, 0.9),
    "transformer_text": (20, 0.9, 8),
}
"""Arguments after method and seed."""


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def test_every_example_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"compare"}
    assert files == SHORT.keys() == example("compare", monkeypatch).EXAMPLES.keys()


# Magnitudes of a network that hardly trained may empty a layer.
@pytest.mark.filterwarnings("ignore:no weight is left")
@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_prunes_to_90_percent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def noted(*args: Any, **options: Any) -> tuple:
        # By magnitude, which compiles nothing; the loop is what is tested.
        options["method"] = "globalmagni"
        params, opt_state, info = prune_masked(*args, **options)
        steps.append(wf.sparsity(wf.masks_of(opt_state)))
        return params, opt_state, info

    monkeypatch.setattr(wf, "prune_masked", noted)
    score = example(name, monkeypatch).train("woodfisher", 0, *SHORT[name])
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(0.9, abs=1e-3)
    if name == "transformer_text":
        assert 1 < score < 128
    else:
        assert 15 < score <= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_woodfisher_is_ahead_of_magnitude(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = example(name, monkeypatch).run(0)
    ahead = found["woodfisher"] - found["magnitude"]
    assert (ahead < 0) if name == "transformer_text" else (ahead > 0), found


def test_the_comparison_says_what_it_takes() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "compare.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--seeds" in done.stdout
