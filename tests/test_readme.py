"""The README's lines of Python run as they stand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax import data

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_ten_lines_run() -> None:
    ten_lines, steps = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    digits = data.load("digits").train
    x = jnp.asarray(digits.images.reshape(-1, 64)[:300] / 16, jnp.float32)
    one, other = jax.random.split(jax.random.key(0))
    names = {
        "samples": (x, jnp.asarray(digits.labels[:300])),
        "params": {
            "hidden": 0.1 * jax.random.normal(one, (64, 12)),
            "out": 0.1 * jax.random.normal(other, (12, 10)),
        },
    }
    exec(ten_lines, names)
    assert set(names["masks"]) == {"hidden", "out"}
    kept = sum(np.count_nonzero(leaf) for leaf in names["params"].values())
    assert kept == names["info"].nonzero == 888 // 10
    # The steps, on a block of 30 weights that are all still there.
    rng = np.random.default_rng(0)
    names |= {
        "batch": names["samples"],
        "gradients": jnp.float32(rng.standard_normal((20, 30))),
        "damping": 1e-3,
        "weights": jnp.float32(rng.standard_normal(30)),
        "kept": 7,
    }
    masks, names["mask"] = names["masks"], jnp.ones(30, bool)
    exec(steps, names)
    assert int(names["mask"].sum()) == 7
    assert names["g"][1].keys() == masks.keys()
    assert names["levels"][-1].sparsity == 0.9


def test_each_linked_page_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_each_method_of_the_table_is_named() -> None:
    import woodfisher_jax as wf

    for page in (README, (Path(__file__).parents[1] / "docs/methods.md").read_text()):
        for name in wf.METHODS:
            assert f"`{name}`" in page, name
