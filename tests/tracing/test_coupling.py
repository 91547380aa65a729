"""Which entries of weights go together, by what an equation does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.tracing.coupling import coupled


def shape(*lengths: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(lengths, jnp.float32)


def channels(between, wide: int = 4, read: int = 4, **more):
    """What a function does to the outputs of one dense layer before the next.

    Args:
        between: (params, [examples, positions, wide]) -> [..., read].
        wide: Outputs of "a".
        read: Inputs of "c".
        **more: Shapes of other parameters.

    Returns:
        For each entry of the outputs of "a" its reason, or the entries of "c" that go
        with it.
    """
    params = {"a": shape(3, wide), "c": shape(read, 2)} | more
    net = lambda p, x: between(p, x @ p["a"]) @ p["c"]  # noqa: E731
    coupling = coupled(net, params, shape(2, 5, 3))
    units = coupling.units
    found = []
    for entry in coupling.weights["a"][1]:
        own = {u for u in units.classes(entry) if not units.reason(u)}
        found.append(
            [
                i
                for i, other in enumerate(coupling.weights["c"][0])
                if own & {*units.classes(other)}
            ]
            if own
            else units.reason(units.classes(entry)[0])
        )
    return found


ONE_TO_ONE = [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    "between",
    [
        lambda p, x: jax.nn.softmax(x, axis=1) * jnp.float32(2),
        lambda p, x: jnp.swapaxes(x, 0, 1).reshape(10, 4),
        lambda p, x: jax.jit(jax.checkpoint(jax.nn.silu))(x),
        lambda p, x: jnp.where(x > 0, x, jnp.ones(4)),
        lambda p, x: jnp.cumsum(x, axis=1)[:, ::2],
        lambda p, x: x[:, jnp.array([0, 0, 4])],
        lambda p, x: jax.lax.dynamic_slice_in_dim(x, 1, 2, axis=1),
        lambda p, x: jax.lax.dynamic_update_slice(x, x[:, :1], (0, 2, 0)),
        lambda p, x: jnp.concatenate([x, jnp.zeros((2, 1, 4))], axis=1),
        lambda p, x: jax.lax.cond(jnp.array(True), jnp.tanh, jnp.negative, x),
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: h + jnp.sin(x) * i, x),
        lambda p, x: jax.lax.optimization_barrier((x, x))[1],
        lambda p, x: jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16),
        lambda p, x: x * jnp.arange(4),
        lambda p, x: jnp.stack([x, x]).mean(0) + jnp.unstack(x, axis=1)[0][:, None],
        lambda p, x: jnp.tile(x, (2, 3, 1)),
        lambda p, x: x * jnp.tile(jnp.ones((2, 5, 1)), 4),
        lambda p, x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
        lambda p, x: x @ p["w"] + x,
    ],
)
def test_entries_that_pass_are_the_same(between) -> None:
    assert channels(between, w=shape(4, 4)) == ONE_TO_ONE


def test_what_is_moved_goes_with_its_place() -> None:
    assert channels(lambda p, x: x[..., ::-1]) == [[3], [2], [1], [0]]
    turned = lambda p, x: jnp.concatenate([x[..., 2:], x[..., :2]], -1)  # noqa: E731
    assert channels(turned) == [[2], [3], [0], [1]]
    padded = lambda p, x: jnp.pad(x, ((0, 0), (0, 0), (1, 2)))  # noqa: E731
    assert channels(padded, read=7) == [[1], [2], [3], [4]]
    rows = lambda p, x: x.reshape(2, -1)  # noqa: E731
    assert channels(rows, read=20)[1] == [1, 5, 9, 13, 17]
    halves = lambda p, x: jnp.split(x, 2, axis=-1)[0] + x[..., 2:]  # noqa: E731
    assert channels(halves, read=2) == [[0], [1], [0], [1]]
    pairs = lambda p, x: x[..., ::2] * x[..., 1::2]  # noqa: E731
    assert channels(pairs, read=2) == [[0], [0], [1], [1]]
    repeated = lambda p, x: jnp.repeat(x, 2, axis=-1)  # noqa: E731
    assert channels(repeated, read=8) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda p, x: jax.nn.softmax(x), "is reduced by 'reduce_max'"),
        (lambda p, x: x + x.mean(-1, keepdims=True), "is reduced by 'reduce_sum'"),
        (lambda p, x: jnp.sort(x), "is mixed by 'sort'"),
        (lambda p, x: jnp.cumsum(x, axis=-1), "is mixed by 'cumsum'"),
        (lambda p, x: x[..., jnp.array([1, 0, 3, 2])], "is looked up"),
        (lambda p, x: x @ x.mT @ x, "is summed between two activations"),
        (lambda p, x: x + x[..., :1], "is taken alone"),
        (lambda p, x: jnp.fft.fft(x).real, "enters 'fft'"),
        (
            lambda p, x: jax.lax.while_loop(lambda h: h.sum() > 9, lambda h: h / 2, x),
            "enters 'while'",
        ),
        (
            lambda p, x: jax.lax.reduce_window(
                x, 0.0, jax.lax.add, (1, 1, 2), (1, 1, 1), "SAME"
            ),
            "is pooled in",
        ),
        (
            lambda p, x: jax.lax.dynamic_slice_in_dim(
                x, jnp.int32(x[0, 0, 0]), 2, axis=-1
            ).repeat(2, -1),
            "is cut at a place that is computed",
        ),
    ],
)
def test_what_is_mixed_stays_for_a_reason(between, reason) -> None:
    found = channels(between)
    assert any(isinstance(r, str) and reason in r for r in found), found


def test_a_counter_that_is_carried_beside_activations_is_none() -> None:
    """So that the weights that it points at are weights."""
    params = {"up": shape(3, 6, 4), "down": shape(3, 4, 6)}

    def net(p, x):
        step = lambda i, h: h + jnp.tanh(h @ p["up"][i]) @ p["down"][i]  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x)

    coupling = coupled(net, params, shape(2, 6))
    own = [coupling.units.classes(entry) for entry in coupling.weights["up"][2]]
    assert own == [coupling.units.classes(e) for e in coupling.weights["down"][1]]
    assert [coupling.units.reason(unit) for (unit,) in own] == [""] * 4


def grouped(groups: int, n: int, m: int):
    """Units of the inputs and the outputs of a convolution in groups."""
    params = {"a": shape(3, n), "k": shape(3, n // groups, m), "c": shape(m, 2)}

    def net(p, x):
        x = jax.lax.conv_general_dilated(
            x @ p["a"],
            p["k"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )
        return x @ p["c"]

    coupling = coupled(net, params, shape(2, 5, 3))
    units = coupling.units

    def parts(path: str, axis: int) -> list[list[int]]:
        """The entries that go together."""
        by_unit: dict[int, list[int]] = {}
        for i, entry in enumerate(coupling.weights[path][axis]):
            for unit in units.classes(entry):
                if not units.reason(unit):
                    by_unit.setdefault(unit, []).append(i)
        return list(by_unit.values())

    return parts("a", 1), parts("c", 0)


def test_groups_of_a_convolution_lose_alike() -> None:
    assert grouped(1, 3, 2) == ([[0], [1], [2]], [[0], [1]])
    # A channel of each group; a filter of each.
    assert grouped(2, 4, 6) == ([[0, 2], [1, 3]], [[0, 3], [1, 4], [2, 5]])
    # A channel and its filters.
    assert grouped(3, 3, 3) == ([[0], [1], [2]], [[0], [1], [2]])
    assert grouped(3, 3, 6) == ([[0], [1], [2]], [[0, 1], [2, 3], [4, 5]])


def test_costs_are_products_of_lengths() -> None:
    params = {"a": shape(3, 4), "k": shape(3, 4, 6)}

    def net(p, x):
        return jax.lax.conv_general_dilated(
            jnp.tanh(x @ p["a"]),
            p["k"],
            (2,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    costs = coupled(net, params, shape(2, 6, 3)).costs
    total = [c.factor * np.prod([len(axis) for axis in c.axes]) for c in costs]
    assert total == [2 * 6 * 3 * 4, 2 * 3 * 3 * 4 * 6]
