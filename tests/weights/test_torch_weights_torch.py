"""The files load in PyTorch and give the same logits; skipped without PyTorch."""

from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import random_variables
from saved_runs import save_run

from woodfisher_jax.models import build_model
from woodfisher_jax.torch_weights import convert
from woodfisher_jax.trees.masks import apply_masks
from woodfisher_jax.trees.prunable import init_masks

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file

import torch_models  # noqa: E402  (imports torch)

CASES = {
    "resnet50": lambda: torch_models.resnet((3, 4, 6, 3), True),
    "mobilenet_v1": torch_models.MobileNetV1,
}


@pytest.mark.parametrize("name", CASES)
def test_a_saved_run_loads_and_agrees(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = np.float32(rng.standard_normal((2, 65, 65, 3)))
    model = build_model(name)
    variables, _ = random_variables(model, images)
    masks = init_masks(variables["params"])
    masks = {p: jax.numpy.asarray(rng.random(m.shape) < 0.5) for p, m in masks.items()}
    variables["params"] = apply_masks(variables["params"], masks)
    run = save_run(tmp_path / "run", {"name": name}, {1: (variables, masks)})
    out, beside = tmp_path / "w.safetensors", tmp_path / "m.safetensors"
    convert(run, out, masks=beside)

    theirs = CASES[name]().eval()
    theirs.load_state_dict(load_file(out), strict=True)
    weights = dict(theirs.named_parameters())
    for key, mask in load_file(beside).items():
        assert not weights[key][~mask].any()
        assert weights[key][mask].all()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    logits = jax.jit(model.apply)(variables, images)
    largest = np.abs(expected.numpy()).max()
    np.testing.assert_allclose(
        logits / largest, expected.numpy() / largest, atol=1e-5, rtol=0
    )
    assert np.std(expected.numpy() / largest) > 0.05
