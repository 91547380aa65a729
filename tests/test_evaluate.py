"""The command reports what a run saved."""

import re
from pathlib import Path

import pytest
from saved_runs import random_network, save_run
from small_runs import run, small

from woodfisher_jax import prune
from woodfisher_jax.evaluate import cli, evaluate_run
from woodfisher_jax.exit_codes import FAILED, USAGE
from woodfisher_jax.selection.patterns import PatternError


def test_a_saved_run_scores_what_its_results_say(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = {"one_shot": True, "method": "magni", "target_sparsity": 0.8}
    results = run(small(dense__epochs=1, prune=changes), tmp_path)
    found = evaluate_run(tmp_path)
    assert {key: found[key] for key in ("top1", "top5", "loss")} == results["final"]
    assert found["sparsity"] == results["sparsity"]
    assert evaluate_run(tmp_path, "best")["sparsity"] == results["sparsity"]
    capsys.readouterr()
    cli([f"--workdir={tmp_path}", "--layers"])
    printed = capsys.readouterr().out
    assert re.search(
        r"checkpoint  \d+: epoch 1, step 22, after pruning step 1\n", printed
    )
    assert re.search(r"MACs        \d+ of 1.18 k an image\n", printed)
    assert f"top-1       {results['final']['top1']:.2f} %" in printed
    assert "sparsity    80.0" in printed
    assert "fc2" in printed


def test_a_saved_run_is_checked_against_a_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"hidden": (16,), "num_classes": 10}
    variables, masks = random_network("mlp", (8, 8, 1), 0.0, **settings)
    params, masks, _ = prune(
        None, variables["params"], method="magni", masks=masks, pattern="2:4"
    )
    model = {"name": "mlp", **settings}
    save_run(tmp_path, model, {1: ({"params": params}, masks)})
    # 64 x 16 and 16 x 10 weights.
    assert evaluate_run(tmp_path, pattern="2:4")["groups"] == (1024 + 160) / 4
    with pytest.raises(PatternError, match=r"'1:4' is broken by"):
        evaluate_run(tmp_path, pattern="1:4")
    for pattern, code in (("2x1", FAILED), ("rows", USAGE)):
        with pytest.raises(SystemExit) as caught:
            cli([str(tmp_path), f"--pattern={pattern}"])
        assert caught.value.code == code
        assert pattern in capsys.readouterr().err
    cli([str(tmp_path), "--pattern=2:4"])
    assert "pattern     2:4 in all 296 groups" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        evaluate_run(tmp_path)
