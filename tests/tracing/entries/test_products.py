"""Which entries go together by the products that they are in, and what these cost."""

import jax
import jax.numpy as jnp
import numpy as np
from coupled_channels import ONE_TO_ONE, channels, shape

from woodfisher_jax.tracing.coupling import coupled


def test_what_a_product_gives_goes_with_what_it_is_added_to() -> None:
    assert channels(lambda p, x: x @ p["w"] + x, w=shape(4, 4)) == ONE_TO_ONE


def test_what_two_activations_are_summed_over_stays() -> None:
    found = channels(lambda p, x: x @ x.mT @ x)
    reason = (
        "is summed between two activations, such as queries and keys, or a weight that "
        "the inputs choose"
    )
    assert found == [reason] * 4


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
