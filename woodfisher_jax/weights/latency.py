"""How long a pruned network's products take, dense and sparse, on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.masks import MasksLike, paired
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.weights.sparse_files import to_bcoo


class Latency(NamedTuple):
    """Milliseconds for all masked arrays, one after the other.

    Attributes:
        batch_size: Rows that each array was multiplied with.
        device: Where the dense and the BCOO products ran.
        dense: x W, compiled.
        bcoo: x W with W a ``jax.experimental.sparse.BCOO``, compiled.
        csr: With W as compressed sparse rows of SciPy, on the CPU.
    """

    batch_size: int
    device: str
    dense: float
    bcoo: float
    csr: float


def latency(
    params: Params,
    masks: MasksLike,
    batch_size: int = 1,
    repeats: int = 20,
) -> Latency:
    """Times the matrix products of the masked arrays.

    An array [..., outputs] counts as the matrix [inputs, outputs], multiplied with
    [batch_size, inputs] numbers: a dense layer for a batch, a convolution for as many
    pixels of its output.

    Args:
        params: Any pytree, pruned weights zero.
        masks: From path to bool, or a pytree of the structure of ``params``; arrays of
            fewer than two dimensions are left out.
        batch_size: Rows; default 1.
        repeats: Timings, of which the median counts; default 20.

    Raises:
        ValueError: If no masked array has two dimensions, or a number is below 1.
    """
    # Imported here, since only this command multiplies with it.
    import scipy.sparse

    if batch_size < 1 or repeats < 1:
        raise ValueError(
            f"batch_size={batch_size}, repeats={repeats}; expected 1 or more of each"
        )
    leaves, masks = leaves_by_path(params), paired(params, masks)
    weights = [_matrix(leaves[p]) for p, mask in masks.items() if np.ndim(mask) > 1]
    kept = [_matrix(mask) for mask in masks.values() if np.ndim(mask) > 1]
    if not weights:
        raise ValueError("masks: expected an array of two or more dimensions")
    rng = np.random.default_rng(0)
    rows = [
        rng.standard_normal((batch_size, len(w)), np.float32).astype(w.dtype)
        for w in weights
    ]
    inputs, dense = list(map(jnp.asarray, rows)), list(map(jnp.asarray, weights))
    bcoo = [to_bcoo(w, k) for w, k in zip(weights, kept, strict=True)]
    # SciPy has no bfloat16, and its sparse matrices multiply from the left.
    csr = [scipy.sparse.csr_matrix(np.float32(w).T) for w in weights]
    columns = [np.ascontiguousarray(np.float32(x).T) for x in rows]
    return Latency(
        batch_size,
        jax.devices()[0].device_kind,
        _milliseconds(lambda: jax.block_until_ready(_products(inputs, dense)), repeats),
        _milliseconds(lambda: jax.block_until_ready(_products(inputs, bcoo)), repeats),
        _milliseconds(
            lambda: [w @ x for w, x in zip(csr, columns, strict=True)], repeats
        ),
    )


def latency_line(found: Latency) -> str:
    """One line that says which is faster, and by how much."""

    def beside_dense(milliseconds: float) -> str:
        ratio = milliseconds / found.dense
        if ratio > 1:
            return f"{milliseconds:.3g} ms, {ratio:.1f} times slower"
        return f"{milliseconds:.3g} ms, {1 / ratio:.1f} times faster"

    return (
        f"products of the pruned arrays, batch {found.batch_size}, {found.device}: "
        f"dense {found.dense:.3g} ms; BCOO {beside_dense(found.bcoo)}; "
        f"CSR of SciPy on the CPU {beside_dense(found.csr)}"
    )


@jax.jit
def _products(inputs: list[jax.Array], weights: list[Any]) -> list[jax.Array]:
    return [x @ w for x, w in zip(inputs, weights, strict=True)]


def _milliseconds(work: Callable[[], Any], repeats: int) -> float:
    work()  # Compiles.
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return 1e3 * statistics.median(spent)


def _matrix(array: jax.Array) -> np.ndarray:
    return np.asarray(array).reshape(-1, np.shape(array)[-1])
