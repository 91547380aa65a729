"""A program with the weights inside computes what the model computes."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import random_network

from woodfisher_jax.models import build_model
from woodfisher_jax.training.objective import predict
from woodfisher_jax.weights.serving import load_stablehlo, save_stablehlo

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp", (8, 8, 1)), ("cifarnet", (32, 32, 3))],
)
def test_a_program_is_read_back(name: str, shape: tuple, tmp_path: Path) -> None:
    model = build_model(name)
    variables, _ = random_network(name, shape, 0.9)
    path = tmp_path / "net.stablehlo"
    save_stablehlo(path, model, variables, shape)
    call = load_stablehlo(path)
    rng = np.random.default_rng(0)
    for batch in (1, 5):
        images = rng.standard_normal((batch, *shape), np.float32)
        expected = jax.jit(predict, static_argnums=0)(model, variables, images)
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(call(images), expected, rtol=1e-5)


def test_the_page_reads_it_with_jax_alone(tmp_path: Path, monkeypatch) -> None:
    model = build_model("mlp")
    variables, _ = random_network("mlp", (8, 8, 1), 0.9)
    monkeypatch.chdir(tmp_path)
    save_stablehlo("digits.stablehlo", model, variables, (8, 8, 1))
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "call" in c]
    images = np.ones((2, 8, 8, 1), np.float32)
    names = {"images": images}
    exec(code, names)
    np.testing.assert_allclose(
        names["logits"], predict(model, variables, images), rtol=1e-5
    )


@pytest.mark.parametrize("content", [b"", b"no program", bytes(200)])
def test_what_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.stablehlo"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a program by jax\.export"):
        load_stablehlo(path)
