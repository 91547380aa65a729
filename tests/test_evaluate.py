"""Accuracy counts every test example once; a saved run is judged as it was."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_runs import random_network, save_run
from small_runs import small

from woodfisher_jax import data, models, prune
from woodfisher_jax.evaluate import cli, evaluate, evaluate_run
from woodfisher_jax.exit_codes import FAILED, USAGE
from woodfisher_jax.selection.patterns import PatternError
from woodfisher_jax.training import loop as train

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("batch_size", [7, 360, 1000])
def test_evaluate_is_counting(batch_size: int) -> None:
    dataset = data.load("digits")
    model = models.build_model("mlp", hidden=(32,))
    rng = np.random.default_rng(0)
    params = {
        "fc1": {"kernel": jnp.float32(rng.standard_normal((64, 32)))},
        "fc2": {"kernel": jnp.float32(rng.standard_normal((32, 10)))},
    }
    x = dataset.test.images.reshape(-1, 64) / dataset.scale
    x = ((x - dataset.mean[0]) / dataset.std[0]).astype(np.float64)
    z = np.maximum(x @ np.float64(params["fc1"]["kernel"]), 0)
    z = z @ np.float64(params["fc2"]["kernel"])
    labels = dataset.test.labels
    rank = (z > z[np.arange(len(z)), labels][:, None]).sum(1)
    logp = z - z.max(1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(1, keepdims=True))
    found = evaluate(model, params, {}, dataset, batch_size=batch_size)
    assert found["top1"] == pytest.approx(100 * np.mean(rank < 1), abs=1e-4)
    assert found["top5"] == pytest.approx(100 * np.mean(rank < 5), abs=1e-4)
    assert found["loss"] == pytest.approx(
        -np.mean(logp[np.arange(len(z)), labels]), rel=1e-5
    )


def test_a_saved_run_scores_what_its_results_say(tmp_path: Path) -> None:
    results = train.run(small(dense__epochs=1), tmp_path)
    found = evaluate_run(tmp_path)
    assert {key: found[key] for key in ("top1", "top5", "loss")} == results["final"]
    assert found["sparsity"] == results["sparsity"]
    assert evaluate_run(tmp_path, "best")["sparsity"] == results["sparsity"]
    done = subprocess.run(
        [sys.executable, "-m", "woodfisher_jax.evaluate", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert f"top-1     {results['final']['top1']:.2f} %" in done.stdout
    assert "sparsity  80.0" in done.stdout


def test_a_saved_run_is_held_against_a_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
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
        command = ["evaluate", str(tmp_path), f"--pattern={pattern}"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as caught:
            cli()
        assert caught.value.code == code
        assert pattern in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command[:2], "--pattern=2:4"])
    cli()
    assert "pattern   2:4 in all 296 groups" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        evaluate_run(tmp_path)


def test_top5_of_few_classes() -> None:
    dataset = data.load("digits")
    model = models.build_model("mlp", hidden=(), num_classes=3)
    image = jnp.zeros((1, 8, 8, 1))
    params = model.init(jax.random.key(0), image)["params"]
    kept = dataset.test.labels < 3
    three = dataset._replace(
        test=data.Split(dataset.test.images[kept], dataset.test.labels[kept])
    )
    assert evaluate(model, params, {}, three)["top5"] == 100.0
