"""What structures that are zero still contribute, added to the next bias."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.structures import Structures
from woodfisher_jax.tracing.entries.units import Array
from woodfisher_jax.tracing.flat import bind
from woodfisher_jax.tracing.layers import Bias, Other, Product, feature_axes, find_uses
from woodfisher_jax.tracing.primitives import Position
from woodfisher_jax.tracing.smaller import Smaller
from woodfisher_jax.trees.paths import Params, leaves_by_path

SAME = 1e-5
"""Of what is to be the same for all inputs, relative to the largest."""

_DIFFERS = (
    "something that differs from place to place or with the inputs (at the border of "
    "an image that is padded, or times another activation)"
)


class _Constants:
    """What structures that are zero contribute to the layers that read them.

    Attributes:
        rows: By the position of the layer, one number for each of its outputs.
    """

    def __init__(
        self,
        found: Structures,
        constant: set[int],
        products: dict[Position, Product],
        biases: Mapping[Position, tuple[Bias, float]],
    ) -> None:
        self.found, self.constant = found, constant
        self.products, self.biases = products, biases
        self.rows: dict[Position, np.ndarray] = {}

    def refused(self, reason: str) -> OptionError:
        """The error for what cannot be folded."""
        names = self.found.names(self.constant)
        expected = (
            "masks that empty the weights that read them as well, as "
            "wf.prune(..., pattern='structures') gives them"
        )
        read = {f.name for f in self.found.families if f.is_read}
        unread = [name for name in names if name not in read]
        if unread:
            # No masks of theirs empty anything else.
            expected = (
                f"the array that reads {unread} as part of params, where net_fn holds "
                "it as a constant now, or pruning that leaves them out of prunable"
            )
        return OptionError(
            "masks",
            f"{names} have outputs that are zero under the masks, but what follows "
            f"makes of them {reason}; expected {expected}",
        )

    def watch(
        self, position: Position, equation: Any, operands: list[tuple[Any, Array]]
    ) -> None:
        """Adds what a product makes of the structures alone.

        Raises:
            OptionError: If that is not one row for all examples and places, or there is
                no bias that could take it.
        """
        activations = [array.active for _, array in operands]
        if sum(activations) != 1:
            return
        side = activations.index(True)
        values = [value for value, _ in operands]
        chosen = self._entries(operands[side][1], _summed(equation, side))
        if not chosen.any():
            return
        values[side] = jnp.where(chosen, values[side], 0)
        (given,) = bind(equation, values)
        rows = np.asarray(given, np.float64)
        if position not in self.rows and not rows.any():
            return
        if position not in self.biases:
            raise self.refused(
                "numbers for which the layer that reads them has no bias that is "
                "added before anything else is, nor a mean of a batch norm in params"
            )
        bias, _ = self.biases[position]
        if not bias.alone:
            raise self.refused(
                f"numbers to be added to {bias.path!r}, but the output of that layer "
                "is read without it as well, as by a skip connection"
            )
        features = feature_axes(self.products[position])
        rest = [i for i in range(rows.ndim) if i not in features]
        rows = rows.transpose(*rest, *features)
        rows = rows.reshape(-1, math.prod(rows.shape[len(rest) :]))
        own = self.rows.setdefault(position, rows[0])
        if np.max(np.abs(rows - own)) > SAME * np.max(np.abs(own)):
            raise self.refused(_DIFFERS)

    def _entries(self, array: Array, summed: Sequence[int]) -> np.ndarray:
        """Which entries of an operand belong to the structures."""
        chosen = np.zeros([len(axis) for axis in array.axes], bool)
        classes = self.found.coupling.units.classes
        for axis in summed:
            one = [bool(self.constant & {*classes(e)}) for e in array.axes[axis]]
            chosen |= np.array(one).reshape(-1, *[1] * (chosen.ndim - axis - 1))
        return chosen


def folded(
    net_fn: Callable[[Params, Any], Any],
    params: Params,
    inputs: Any,
    found: Structures,
    constant: set[int],
) -> dict[str, jax.Array]:
    """Biases, and means of batch norms, with what structures contribute.

    Args:
        net_fn: (params, inputs) -> outputs.
        params: With zeros where masks have them.
        inputs: One batch.
        found: The network's structures.
        constant: Units of those that nothing makes.

    Returns:
        The new arrays by path.

    Raises:
        OptionError: If one is not, or there is no bias that could take it, or one that
            is read in several places.
    """
    uses = [u for own in find_uses(net_fn, params, inputs).values() for u in own]
    # With the sign of what they contribute.
    biases = {use.position: (use, 1.0) for use in uses if isinstance(use, Bias)}
    for use in uses:
        if isinstance(use, Other) and use.subtracted is not None:
            biases.setdefault(use.subtracted.position, (use.subtracted, -1.0))
    products = {use.position: use for use in uses if isinstance(use, Product)}
    constants = _Constants(found, constant, products, biases)
    if any(map(found.coupling.units.varies, constant)):
        # Even if it is nothing for the inputs that are given.
        raise constants.refused(_DIFFERS)
    program = Smaller(found.coupling, set(), constants.watch)
    # A single example shows nothing of how they depend on the inputs.
    for given in (inputs, jax.tree.map(_nothing, inputs)):
        program(jax.tree.leaves((params, given)))
    leaves = leaves_by_path(params)
    changed: dict[str, jax.Array] = {}
    for position, row in constants.rows.items():
        bias, sign = biases[position]
        if sum(use.path == bias.path for use in uses) > 1:
            raise constants.refused(
                f"numbers to be added to {bias.path!r}, which is read in several places"
            )
        old = changed.get(bias.path, leaves[bias.path])
        # A copy: the array is the caller's.
        total = np.array(old, np.float64).reshape(-1)
        total[bias.entries] += sign * row
        dtype = jax.dtypes.canonicalize_dtype(old.dtype)
        changed[bias.path] = jnp.asarray(total.reshape(old.shape), dtype)
    return changed


def _summed(equation: Any, side: int) -> Sequence[int]:
    """The axes of a product's operand that it is summed over, without windows."""
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "conv_general_dilated":
        return [numbers.lhs_spec[1]]
    return numbers[0][side]


def _nothing(array: Any) -> Any:
    """Zeros in place of numbers."""
    return array if _is_key(array) else jnp.zeros_like(array)


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key)
