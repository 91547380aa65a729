"""How long networks take on this machine: products, and whole forward passes."""

import importlib.util
import runpy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.masks import MasksLike, paired
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.weights.files import save_safetensors
from woodfisher_jax.weights.sparse_files import to_bcoo
from woodfisher_jax.weights.state_dicts import to_state_dict
from woodfisher_jax.weights.torch_code import torch_code

OF_ONNX = ("torch", "onnxscript", "onnxruntime")
"""Packages that `onnx_latency` needs, which no extra installs."""

BATCH_SIZES = (1, 64)
"""For which commands measure: what is fast for one row may be slow for many."""


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


class Spread(NamedTuple):
    """Milliseconds of several timings: the median and the quartiles."""

    median: float
    lower: float
    upper: float


class ForwardLatency(NamedTuple):
    """A whole forward pass of a network, and of a smaller one.

    Attributes:
        batch_size: Examples that went in together.
        runtime: "jit" or "onnxruntime".
        device: Where both ran.
        dense: Of the network.
        small: Of the smaller one.
    """

    batch_size: int
    runtime: str
    device: str
    dense: Spread
    small: Spread


def forward_latency(
    dense: tuple[Callable[[Any, Any], Any], Any],
    small: tuple[Callable[[Any, Any], Any], Any],
    inputs: Any,
    repeats: int = 20,
) -> ForwardLatency:
    """Times the forward passes of two networks under ``jit``, in turn.

    Args:
        dense: A function (params, inputs) -> outputs, and its params; of a Linen module
            ``(model.apply, variables)``.
        small: The same of the smaller network.
        inputs: Of both, an array [batch, ...] or a pytree of such.
        repeats: Timings of each; default 20.

    Raises:
        ValueError: If ``repeats`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from woodfisher_jax.weights.latency import forward_latency
        >>> net = lambda params, x: x @ params
        >>> x = jnp.ones((64, 100))
        >>> found = forward_latency(
        ...     (net, jnp.ones((100, 100))), (net, jnp.ones((100, 10))), x)
        >>> found.batch_size, found.runtime
        (64, 'jit')
    """
    inputs = jax.tree.map(jnp.asarray, inputs)

    def work(network: tuple[Callable[[Any, Any], Any], Any]) -> Callable[[], Any]:
        # As arguments, for constants would be folded where they meet.
        net_fn, params = jax.jit(network[0]), jax.tree.map(jnp.asarray, network[1])
        return lambda: jax.block_until_ready(net_fn(params, inputs))

    times = _spreads(work(dense), work(small), repeats)
    size = jax.tree.leaves(inputs)[0].shape[0]
    return ForwardLatency(size, "jit", jax.devices()[0].device_kind, *times)


def onnx_latency(
    dense: tuple[nn.Module, Any],
    small: tuple[nn.Module, Any],
    inputs: np.ndarray,
    repeats: int = 20,
) -> ForwardLatency:
    """Times the forward passes of two networks under ONNX Runtime on the CPU, in turn.

    Args:
        dense: A network of this package that `torch_code` knows, and its variables.
        small: The same of the smaller network.
        inputs: Of both: images [batch, height, width, channels], or tokens [batch, T].
        repeats: Timings of each; default 20.

    Raises:
        ValueError: If ``repeats`` is below 1, or there are no lines of PyTorch for such
            a network.
        ImportError: If one of `OF_ONNX` is not installed.
    """
    if not runs_onnx():
        raise ImportError(
            f"onnx_latency needs {', '.join(OF_ONNX)}: pip install {' '.join(OF_ONNX)}"
        )
    given = np.asarray(inputs)
    if given.ndim == 4:
        given = np.ascontiguousarray(given.transpose(0, 3, 1, 2))
    times = _spreads(_onnx(*dense, given), _onnx(*small, given), repeats)
    return ForwardLatency(len(given), "onnxruntime", "cpu", *times)


def runs_onnx() -> bool:
    """Whether what `onnx_latency` needs is installed."""
    return all(importlib.util.find_spec(name) for name in OF_ONNX)


def forward_line(found: ForwardLatency) -> str:
    """One line on a whole forward pass, dense and small."""

    def shown(one: Spread) -> str:
        return f"{one.median:.3g} ms ({one.lower:.3g} to {one.upper:.3g})"

    ratio = found.dense.median / found.small.median
    times = f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} slower"
    return (
        f"forward pass, batch {found.batch_size}, {found.runtime} on {found.device}: "
        f"dense {shown(found.dense)}; small {shown(found.small)}, {times}"
    )


def _onnx(model: nn.Module, variables: Any, inputs: np.ndarray) -> Callable[[], Any]:
    """A forward pass under ONNX Runtime, the program written by PyTorch."""
    torch = importlib.import_module("torch")
    runtime = importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        weights, program = Path(folder, "net.safetensors"), Path(folder, "net.onnx")
        save_safetensors(weights, to_state_dict(variables), {"format": "pt"})
        code = Path(folder, "net.py")
        code.write_text(torch_code(model, weights.name))
        network = runpy.run_path(str(code))["load"](weights)
        example = (torch.from_numpy(inputs),)
        with warnings.catch_warnings():
            # PyTorch's exporter warns of its own code.
            warnings.simplefilter("ignore")
            torch.onnx.export(network, example, str(program), verbose=False)
        session = runtime.InferenceSession(
            str(program), providers=["CPUExecutionProvider"]
        )
    named = {session.get_inputs()[0].name: inputs}
    return lambda: session.run(None, named)


@jax.jit
def _products(inputs: list[jax.Array], weights: list[Any]) -> list[jax.Array]:
    return [x @ w for x, w in zip(inputs, weights, strict=True)]


def _milliseconds(work: Callable[[], Any], repeats: int) -> float:
    (spent,) = _timed([work], repeats)
    return statistics.median(spent)


def _spreads(
    dense: Callable[[], Any], small: Callable[[], Any], repeats: int
) -> tuple[Spread, Spread]:
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected 1 or more")
    first, second = (
        Spread(*(float(np.quantile(spent, q)) for q in (0.5, 0.25, 0.75)))
        for spent in _timed([dense, small], repeats)
    )
    return first, second


def _timed(works: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of each, in turn, so that what else runs meets all of them."""
    for work in works:
        work()  # Compiles.
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, spent, strict=True):
            started = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - started))
    return spent


def _matrix(array: jax.Array) -> np.ndarray:
    return np.asarray(array).reshape(-1, np.shape(array)[-1])
