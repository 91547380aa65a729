"""What a function does to the channels between two dense layers."""

import jax
import jax.numpy as jnp

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
