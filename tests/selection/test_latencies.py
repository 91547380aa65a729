"""Times of products by their widths."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax.selection import latencies
from woodfisher_jax.selection.latencies import timed


def net(params, x):
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, params["first"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    x = jax.lax.conv_general_dilated(
        x,
        params["depthwise"],
        (1, 1),
        "SAME",
        dimension_numbers=dimensions,
        feature_group_count=x.shape[-1],
    )
    return jnp.mean(jnp.tanh(x), (1, 2)) @ params["last"]


@pytest.fixture(scope="module")
def found():
    shapes = {"first": (3, 3, 2, 8), "depthwise": (3, 3, 1, 8), "last": (8, 5)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    return wf.structures(net, params, jnp.ones((4, 6, 6, 2)))


def test_times_of_fewer_channels_lie_between_those_measured(found, monkeypatch):
    # A product takes as many milliseconds as its weights have entries.
    monkeypatch.setattr(
        latencies, "_seconds", lambda run, operands: operands[1].size / 1e3
    )
    slow = timed(found)
    assert slow.account().left["latency"] == pytest.approx(144 + 72 + 40)
    (units,) = slow.units
    left = slow.account(units[:3]).left["latency"]
    assert left == pytest.approx((144 + 72 + 40) * 5 / 8)


def test_times_are_kept_in_a_file_and_not_taken_again(found, tmp_path, monkeypatch):
    file = tmp_path / "times.json"
    monkeypatch.setattr(latencies, "REPEATS", 1)
    before = timed(found, file).account().left["latency"]
    assert before > 0
    assert len(json.loads(file.read_text())) == 12  # three products, four lengths

    def refused(*_):
        raise AssertionError("timed again")

    monkeypatch.setattr(latencies, "_seconds", refused)
    assert timed(found, file).account().left["latency"] == before


@pytest.mark.parametrize("content", ["{cut", "[1, 2]", '{"a": "b"}', None])
def test_a_file_without_times_is_refused_by_name(found, tmp_path, monkeypatch, content):
    file = tmp_path / "times.json"
    file.mkdir() if content is None else file.write_text(content)

    def refused(*_):
        raise AssertionError("timed before the file was read")

    monkeypatch.setattr(latencies, "_seconds", refused)
    with pytest.raises(wf.OptionError, match=r"times='.*times.json' holds no times"):
        timed(found, file)


def test_more_channels_do_not_take_less_time(found, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(latencies, "_seconds", lambda *_: float(rng.uniform()))
    noisy = timed(found)
    (units,) = noisy.units
    left = [noisy.account(units[:n]).left["latency"] for n in range(8)]
    assert left == sorted(left, reverse=True)
