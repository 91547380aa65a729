"""A function in segments is the function, cut where its layers take their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from arrays import normal

from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.tracing.segments import Program
from woodfisher_jax.trees.paths import leaves_by_path

WIDTH, DEPTH = 6, 3


def block(h, w):
    mixed = jax.nn.relu((h @ w["a"]) * (h @ w["b"]))
    return h + jax.jit(lambda m: jnp.tanh(m) @ w["c"])(mixed)


def stacked(params, x):
    def body(h, w):
        return jax.checkpoint(block)(h, w), h.sum()

    h, sums = jax.lax.scan(body, x @ params["first"], params["stack"])
    return h @ params["last"], sums


def plain(params, x):
    h, sums = x @ params["first"], []
    for i in range(DEPTH):
        sums.append(h.sum())
        h = block(h, {name: params["stack"][name][i] for name in "abc"})
    return h @ params["last"], jnp.stack(sums)


def parameters():
    stack = {n: normal(i, DEPTH, WIDTH, WIDTH) / 3 for i, n in enumerate("abc")}
    return {"first": normal(3, 5, WIDTH), "stack": stack, "last": normal(4, WIDTH, 4)}


X = normal(5, 7, 5)


def products_of(program: Program) -> list[Product]:
    found = [use for uses in program.uses.values() for use in uses]
    return [use for use in found if isinstance(use, Product)]


def cut(program: Program):
    stages = program.stages(products_of(program))
    targets = [tuple(dict.fromkeys(map(program.operand, s))) for s in stages]
    ends = tuple(program.jaxpr.outvars)
    return stages, program.segments([*targets, ends])


def run(segments, params, batch):
    leaves, taken, inputs = leaves_by_path(params), jax.tree.leaves(batch), []
    for segment in segments:
        values = [read.of(leaves[read.path]) for read in segment.reads]
        taken, found = segment.run(values, taken)
        inputs.append(found)
    return inputs


def test_layers_that_need_no_other_are_a_stage() -> None:
    for net in (stacked, plain):
        stages, _ = cut(Program(net, parameters(), X))
        names = [[product.path for product in stage] for stage in stages]
        blocks = [["stack/a", "stack/b"], ["stack/c"]] * DEPTH
        assert names == [["first"], *blocks, ["last"]]


def test_segments_one_after_another_are_the_function() -> None:
    params = parameters()
    for net in (stacked, plain):
        _, segments = cut(Program(net, params, X))
        *_, outputs = run(segments, params, X)
        for found, expected in zip(outputs, jax.jit(net)(params, X), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_layer_is_given_what_it_multiplies() -> None:
    params = parameters()
    _, segments = cut(Program(stacked, params, X))
    inputs = run(segments, params, X)
    h = X @ params["first"]
    np.testing.assert_array_equal(inputs[0][0], X)
    for i in range(DEPTH):
        np.testing.assert_allclose(inputs[1 + 2 * i][0], h, rtol=1e-5)
        h = jax.jit(block)(h, {name: params["stack"][name][i] for name in "abc"})


def test_a_later_segment_sees_new_weights_of_an_earlier_layer() -> None:
    params = parameters()
    _, segments = cut(Program(stacked, params, X))
    changed = jax.tree.map(lambda a: a, params)
    changed["stack"]["a"] = changed["stack"]["a"].at[1].set(0.0)
    *_, outputs = run(segments, changed, X)
    expected = jax.jit(stacked)(changed, X)[0]
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-5)


def test_equal_segments_share_one_program() -> None:
    program = Program(lambda p, x: stacked(p, x)[0], parameters(), X)
    _, segments = cut(program)
    assert segments[3].reads != segments[5].reads
    # Before the first layer, before a block, within one, between two, after the last.
    assert len(program.functions) == 5
    assert len(segments) == 2 * DEPTH + 3


def test_arrays_that_a_function_closes_over_are_no_part_of_its_program() -> None:
    shift = np.linspace(0, 1, WIDTH, dtype=np.float32)

    def net(params, x):
        return jnp.tanh(x @ params["first"] + shift) @ params["last"]

    params = parameters()
    _, segments = cut(Program(net, params, X))
    *_, (found,) = run(segments, params, X)
    np.testing.assert_allclose(found, net(params, X), rtol=1e-5)


def test_shared_inputs_of_a_batch_are_kept_until_they_are_used() -> None:
    def net(params, batch):
        x, scale = batch
        return ((x @ params["first"]) @ params["middle"] * scale) @ params["last"]

    params = parameters() | {"middle": jnp.eye(WIDTH)}
    batch = (X, jnp.arange(7.0)[:, None])
    _, segments = cut(Program(net, params, batch))
    *_, (found,) = run(segments, params, batch)
    np.testing.assert_allclose(found, net(params, batch), rtol=1e-5)
