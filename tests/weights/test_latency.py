"""What the line on latency says follows from the figures; no time is tested."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.models import build_model
from woodfisher_jax.weights import latency as module
from woodfisher_jax.weights.latency import (
    OF_ONNX,
    ForwardLatency,
    Latency,
    Spread,
    forward_latency,
    forward_line,
    latency,
    latency_line,
    onnx_latency,
)


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


def test_both_networks_are_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) ** 2)
    monkeypatch.setattr(module, "time", clock)
    shapes = []

    def net(params: jax.Array, x: jax.Array) -> jax.Array:
        shapes.append(params.shape)
        return x @ params

    dense, small = jnp.ones((4, 3)), jnp.ones((4, 2))
    found = forward_latency((net, dense), (net, small), np.ones((5, 4)), repeats=3)
    assert shapes == [(4, 3), (4, 2)]
    assert (found.batch_size, found.runtime) == (5, "jit")
    # From t to t + 1 it takes 2 t + 1 seconds; dense starts at 0, 4 and 8.
    assert found.dense == pytest.approx((9000, 5000, 13000))
    assert found.small == pytest.approx((13000, 9000, 17000))
    with pytest.raises(ValueError, match="repeats=0; expected 1 or more"):
        forward_latency((net, dense), (net, small), np.ones((5, 4)), repeats=0)


def test_the_line_says_how_much_faster() -> None:
    line = forward_line(
        ForwardLatency(64, "jit", "cpu", Spread(6.0, 5.5, 7.0), Spread(4.0, 3.0, 4.25))
    )
    assert line == (
        "forward pass, batch 64, jit on cpu: dense 6 ms (5.5 to 7); small 4 ms (3 to "
        "4.25), 1.50 times faster"
    )


@pytest.mark.slow
def test_onnx_runtime_runs_what_pytorch_writes() -> None:
    for name in OF_ONNX:
        pytest.importorskip(name)
    images = np.ones((2, 8, 8, 3), np.float32)
    dense = build_model("mlp")
    small = dense.clone(widths={"fc1": 3})
    dense, small = (
        (net, jax.jit(net.init)(jax.random.key(0), images)) for net in (dense, small)
    )
    found = onnx_latency(dense, small, images, repeats=2)
    assert (found.batch_size, found.runtime) == (2, "onnxruntime")
    assert min(*found.dense, *found.small) > 0


def test_what_onnx_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runs_onnx", lambda: False)
    net = (build_model("mlp"), {})
    with pytest.raises(ImportError, match="pip install torch onnxscript onnxruntime"):
        onnx_latency(net, net, np.ones((1, 4)))
