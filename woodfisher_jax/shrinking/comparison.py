"""Whether a smaller network says what the masked one says.

Outputs are compared on the given inputs and on other numbers in their places, so that
inputs on which both networks are silent, such as zeros, do not hide a difference. A
difference is relative to the largest output that depends on the parameters: a score
that is masked by -1e9 says nothing of the others.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.trees.paths import Params

NetFn = Callable[[Params, Any], Any]

TOLERANCE = 1e-5
"""Of outputs, relative to the largest one."""

ROUNDED = 4
"""As many roundings of the outputs' own type, where that is coarser."""

MOST_ROUNDED = 1e-2
"""What rounding parameters otherwise may explain on the given inputs, relative to the
largest output."""

EXAMPLES = 16
"""Examples of either kind of other numbers, at least: in a single one the neurons that
stay may all be silent."""


def outputs_of(net_fn: NetFn, params: Params, inputs: Any) -> Any:
    """A function's outputs, precise enough to compare on any device.

    Args:
        net_fn: (params, inputs) -> any pytree of arrays.
        params: Any pytree of arrays.
        inputs: One batch.
    """
    with jax.default_matmul_precision("highest"):
        return jax.jit(net_fn)(params, inputs)


def any_nan(outputs: Any) -> bool:
    """Whether an output is not a number."""
    return any(np.isnan(_wide(leaf)).any() for leaf in jax.tree.leaves(outputs))


class Comparison:
    """The network that smaller ones are compared with.

    Attributes:
        wanted: Its outputs on the given inputs.
    """

    def __init__(self, net_fn: NetFn, params: Params, inputs: Any) -> None:
        """Takes its outputs.

        Args:
            net_fn: (params, inputs) -> any pytree of arrays.
            params: With zeros where masks have them.
            inputs: One batch.
        """
        self._net_fn, self._params, self._inputs = net_fn, params, inputs
        self.wanted = outputs_of(net_fn, params, inputs)

    def change(self, small_fn: NetFn, small: Params) -> str:
        """What a smaller network changes; "" if nothing that rounding does not.

        Args:
            small_fn: (small, inputs) -> the same pytree.
            small: Its parameters.

        Returns:
            A clause that follows "changes".
        """
        found = outputs_of(small_fn, small, self._inputs)
        change = self._differs(found, self.wanted, self._inputs, MOST_ROUNDED)
        if change:
            return change
        # Eager checks of numbers, such as for NaN, are for the caller's inputs.
        with jax.debug_nans(False), jax.debug_infs(False):
            for others in _others(self._inputs):
                wanted = outputs_of(self._net_fn, self._params, others)
                if any_nan(wanted):
                    continue  # Such as the logarithm of a negative number.
                found = outputs_of(small_fn, small, others)
                change = self._differs(found, wanted, others, np.inf)
                if change:
                    return f"{change}, with other numbers in the inputs' places"
        return ""

    def _differs(self, found: Any, wanted: Any, inputs: Any, rounded: float) -> str:
        """Clause by clause of :meth:`change`, for one batch."""
        pairs = list(zip(*map(jax.tree.leaves, (found, wanted)), strict=True))
        for new, old in pairs:
            if new.shape != old.shape:
                return f"outputs of shape {old.shape} into {new.shape}"
        if all(_close(_wide(new), _wide(old), _allowed(old)) for new, old in pairs):
            return ""
        moved = outputs_of(self._net_fn, _all_rounded(self._params), inputs)
        # Of all outputs, so that one that rounding spares by chance is judged alike.
        shares = []
        for (new, old), other in zip(pairs, jax.tree.leaves(moved), strict=True):
            a, b, c = map(_wide, (new, old, other))
            largest = _largest(b, c != b) or _largest(b, a != b) or 1.0
            shares.append((_off(a, b) / largest, _off(c, b) / largest, _allowed(old)))
        # A deep network may round as much by itself.
        most = min(ROUNDED * max(own for _, own, _ in shares), rounded)
        for off, _, allowed in shares:
            if not (off <= allowed or off <= most):
                return (
                    f"outputs by {off:.2g} of the largest, expected at most {allowed:g}"
                )
        return ""


def _close(new: np.ndarray, old: np.ndarray, allowed: float) -> bool:
    """Whether the difference is small beside the largest of those that differ."""
    return bool(_off(new, old) <= allowed * _largest(old, new != old))


def _others(inputs: Any) -> Iterator[Any]:
    """Batches with other numbers: smaller ones of the same signs, then of any sign."""
    leaves, tree = jax.tree.flatten(inputs)
    if not any(map(_is_real, leaves)):
        return
    chance = np.random.default_rng(0)
    examples = max([np.shape(leaf)[0] for leaf in leaves if np.ndim(leaf)], default=1)
    for least in (0.0, -1.0) * -(-EXAMPLES // max(examples, 1)):
        new = []
        for leaf in leaves:
            if _is_real(leaf):
                factor = chance.uniform(least, 1.0, np.shape(leaf))
                values = np.asarray(leaf, np.float64)
                values = np.where(values == 0, factor, values * factor)
                own = values.astype(leaf.dtype)
                # Where the given array lies, for nothing is compiled again then.
                place = leaf.sharding if isinstance(leaf, jax.Array) else None
                leaf = own if place is None else jax.device_put(own, place)
            new.append(leaf)
        yield jax.tree.unflatten(tree, new)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _rounded(array: jax.Array) -> jax.Array:
    """The same numbers, each half a rounding away, up or down in turn."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    signs = 1 - 2 * (jnp.arange(array.size) % 2).reshape(array.shape)
    eps = jnp.finfo(array.dtype).eps
    return (array * (1 + eps * signs)).astype(array.dtype)


@jax.jit
def _all_rounded(params: Params) -> Params:
    return jax.tree.map(_rounded, params)


def _allowed(array: jax.Array) -> float:
    """What may differ, relative to the largest."""
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    eps = float(jnp.finfo(array.dtype).eps) if inexact else 0.0
    return max(TOLERANCE, ROUNDED * eps)


def _wide(array: jax.Array) -> np.ndarray:
    """The same numbers in 64 bits."""
    return np.asarray(array).astype(complex if jnp.iscomplexobj(array) else float)


def _largest(array: np.ndarray, where: np.ndarray) -> float:
    """The largest finite entry among some."""
    return float(np.max(np.abs(array), where=where & np.isfinite(array), initial=0))


def _off(new: np.ndarray, old: np.ndarray) -> float:
    """The largest difference; infinities, as of masked scores, are the same or not."""
    off = np.subtract(new, old, where=new != old, out=np.zeros_like(old))
    return float(np.max(np.abs(off), initial=0))
