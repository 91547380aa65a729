"""What the line on latency says follows from the figures; no time is tested."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.weights.latency import Latency, latency, latency_line


def test_every_masked_matrix_is_multiplied() -> None:
    rng = np.random.default_rng(0)
    masks = {
        "conv": jnp.asarray(rng.random((3, 3, 2, 4)) < 0.2),
        "dense": jnp.asarray(rng.random((8, 5)) < 0.2),
        "bias": jnp.ones(5, bool),
    }
    params = {path: jnp.float32(mask) for path, mask in masks.items()}
    for dtype in (jnp.float32, jnp.bfloat16):
        given = {path: leaf.astype(dtype) for path, leaf in params.items()}
        found = latency(given, masks, batch_size=3, repeats=2)
        assert found.batch_size == 3
        assert found.device == "cpu"
        assert min(found.dense, found.bcoo, found.csr) > 0


def test_the_line_says_which_is_slower() -> None:
    line = latency_line(Latency(1, "cpu", dense=2.0, bcoo=9.0, csr=0.5))
    assert "dense 2 ms; BCOO 9 ms, 4.5 times slower;" in line
    assert "on the CPU 0.5 ms, 4.0 times faster" in line


def test_nothing_to_time_is_refused() -> None:
    params, masks = {"a": jnp.ones(3)}, {"a": jnp.ones(3, bool)}
    with pytest.raises(ValueError, match="two or more dimensions"):
        latency(params, masks)
    for number in ("batch_size", "repeats"):
        with pytest.raises(ValueError, match=f"{number}=0"):
            latency(params, masks, **{number: 0})
