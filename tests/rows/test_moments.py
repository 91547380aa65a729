"""Mean gradient and trace, added up on the way."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.rows.moments import Moments
from woodfisher_jax.trees.blocks import flat_order, flatten

RANDOM = np.random.default_rng(0)
ROWS = {"a": RANDOM.standard_normal((11, 3, 2)), "b": RANDOM.standard_normal((11, 4))}


def chunks(paths=("a", "b")):
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        yield {p: jnp.float32(ROWS[p][start:stop]) for p in paths}


def test_moments_of_all_samples() -> None:
    moments = Moments()
    passed = list(moments.through(chunks()))
    assert [len(chunk["a"]) for chunk in passed] == [4, 1, 6]
    order = flat_order({p: jnp.asarray(r[0]) for p, r in ROWS.items()})
    mean = {p: jnp.asarray(r.mean(0)) for p, r in ROWS.items()}
    np.testing.assert_allclose(moments.vector(order), flatten(order, mean), rtol=1e-5)
    for path, rows in ROWS.items():
        assert moments.trace[path] == pytest.approx((rows**2).sum() / 11, rel=1e-5)


def test_tensors_may_pass_apart_and_twice() -> None:
    whole, apart = Moments(), Moments()
    list(whole.through(chunks()))
    for paths in (("b",), ("a",), ("a", "b")):
        list(apart.through(chunks(paths)))
    assert apart.trace == whole.trace
    np.testing.assert_array_equal(apart.mean["a"], whole.mean["a"])
