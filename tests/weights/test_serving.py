"""A program with the weights inside computes what the model computes."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import random_variables

from woodfisher_jax.models import build_model
from woodfisher_jax.weights.serving import load_stablehlo, save_stablehlo

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (8, 8, 1)),
        pytest.param("cifarnet", (32, 32, 3), marks=pytest.mark.slow),
    ],
)
def test_a_program_is_restored(name: str, shape: tuple, tmp_path: Path) -> None:
    model = build_model(name)
    images = np.random.default_rng(0).standard_normal((5, *shape), np.float32)
    variables, _ = random_variables(model, images)
    path = tmp_path / "net.stablehlo"
    save_stablehlo(path, lambda images: model.apply(variables, images), shape)
    call = load_stablehlo(path)
    for batch in (images[:1], images):
        expected = jax.jit(model.apply)(variables, batch)
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(call(batch), expected, rtol=1e-5, atol=1e-5)


def test_the_page_reads_it_with_jax_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_stablehlo("digits.stablehlo", lambda x: 2 * x.sum((2, 3)), (8, 8, 1))
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "call" in c]
    names = {"images": np.ones((2, 8, 8, 1), np.float32)}
    exec(code, names)
    np.testing.assert_array_equal(names["logits"], np.full((2, 8), 16))


@pytest.mark.parametrize("content", [b"", b"no program", bytes(200)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.stablehlo"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a program by jax\.export"):
        load_stablehlo(path)
