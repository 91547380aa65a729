"""Gradients that arrive in chunks end up whole, each in its block."""

import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.pruning.blocks import flat_order, full_matrix, within_tensors
from woodfisher_jax.pruning.panels import whole
from woodfisher_jax.pruning.store import collect, mean_square, new_store

SHAPES = {"a": (3, 5), "b/kernel": (4, 2)}
LENGTHS = (4, 4, 2)


@pytest.fixture
def gradients() -> dict[str, np.ndarray]:
    """Ten gradients of each tensor."""
    rng = np.random.default_rng(0)
    return {p: rng.standard_normal((10, *s)) for p, s in SHAPES.items()}


def chunks(gradients: dict[str, np.ndarray]):
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        yield {p: jnp.float32(g[rows]) for p, g in gradients.items()}
        start += length


def flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Written out: ``a`` in its own order, the kernel as (out, in)."""
    a = gradients["a"].reshape(10, -1)
    kernel = gradients["b/kernel"].transpose(0, 2, 1).reshape(10, -1)
    return np.concatenate([a, kernel], axis=1)


def stored(gradients: dict[str, np.ndarray], order, layout) -> np.ndarray:
    """The blocks of a layout of one group [num_blocks, N, width]."""
    part = whole(order, layout, 10)
    store = new_store("device", part, 10, "float32")
    collect(chunks(gradients), part, store, "float32")
    return np.concatenate(list(store.panels(part.panels)))


def test_mean_square_is_the_diagonal_of_the_undamped_fisher(gradients) -> None:
    found = mean_square(chunks(gradients), 10)
    for path, g in gradients.items():
        rows = g.reshape(10, -1)
        expected = np.diagonal(rows.T @ rows / 10).reshape(SHAPES[path])
        np.testing.assert_allclose(found[path], expected, rtol=2e-6)


def test_the_full_matrix_holds_all_tensors_in_order(gradients) -> None:
    order = flat_order({p: np.zeros(s) for p, s in SHAPES.items()})
    store = stored(gradients, order, full_matrix(order))
    np.testing.assert_array_equal(store, np.float32(flat(gradients))[None])


def test_chunks_of_a_tensor_are_padded_with_zeros(gradients) -> None:
    order = flat_order({p: np.zeros(s) for p, s in SHAPES.items()})
    layout = within_tensors(order, 6)
    store = stored(gradients, order, layout)
    g = np.float32(flat(gradients))
    bounds = [(0, 6), (6, 12), (12, 15), (15, 21), (21, 23)]
    assert store.shape == (5, 10, 6)
    for block, (start, stop) in zip(np.asarray(store), bounds, strict=True):
        np.testing.assert_array_equal(block[:, : stop - start], g[:, start:stop])
        assert (block[:, stop - start :] == 0).all()
