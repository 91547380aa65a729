"""Whether a smaller network says what the masked one says.

Outputs are compared on the given inputs and on other numbers in their places, so that
inputs on which both networks are silent, such as zeros, do not hide a difference. A
difference is relative to the largest output that depends on the parameters: a score
that is masked by -1e9 says nothing of the others.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr

from woodfisher_jax.tracing.primitives import inner_jaxprs
from woodfisher_jax.trees.paths import Params

NetFn = Callable[[Params, Any], Any]

TOLERANCE = 1e-5
"""Of outputs, relative to the largest one."""

ROUNDED = 4
"""As many roundings of the outputs' own type, where that is coarser."""

MOST_ROUNDED = 1e-2
"""What rounding parameters otherwise may explain on the given inputs, relative to the
largest output. Other inputs may be such that an output is nothing but rounding."""

EXAMPLES = 8
"""Examples of either kind of other numbers, at least: in a single one the neurons that
stay may all be silent."""

_PRECISE = functools.partial(jax.default_matmul_precision, "highest")


def outputs_of(net_fn: NetFn, params: Params, inputs: Any) -> Any:
    """A function's outputs, precise enough to compare on any device.

    Args:
        net_fn: (params, inputs) -> any pytree of arrays.
        params: Any pytree of arrays.
        inputs: One batch.
    """
    with _PRECISE():
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
        change = self._differs([self._inputs], [found], [self.wanted], MOST_ROUNDED)
        if change:
            return change
        others, wanted, found = [], [], []
        # Eager checks of numbers, such as for NaN, are for the caller's inputs.
        with jax.debug_nans(False), jax.debug_infs(False):
            for inputs in self._others:
                own = self._outputs_if_any(inputs)
                if own is not None:
                    others.append(inputs)
                    wanted.append(own)
                    found.append(outputs_of(small_fn, small, inputs))
            change = self._differs(others, found, wanted, np.inf)
        return f"{change}, with other numbers in the inputs' places" if change else ""

    @functools.cached_property
    def _others(self) -> list[Any]:
        """Other inputs; none where a loop might not end on them."""
        with _PRECISE():
            # As traced before, for the outputs.
            program = jax.jit(self._net_fn).trace(self._params, self._inputs).jaxpr
        return [] if _may_not_end(program.jaxpr) else list(_others(self._inputs))

    def _outputs_if_any(self, inputs: Any) -> Any:
        """What the masked network says, unless it refuses or gives no numbers."""
        try:
            own = jax.block_until_ready(outputs_of(self._net_fn, self._params, inputs))
        except Exception:
            # The function may check its inputs, in its own way.
            return None
        return None if any_nan(own) else own  # Such as the logarithm of -1.

    def _differs(
        self,
        inputs: Sequence[Any],
        found: Sequence[Any],
        wanted: Sequence[Any],
        rounded: float,
    ) -> str:
        """The clause of :meth:`change` for some batches, on one scale.

        Args:
            inputs: Batches.
            found: Outputs of the smaller network.
            wanted: Those of the masked one.
            rounded: What rounding parameters otherwise may explain.
        """
        new, old = _stacked(found), _stacked(wanted)
        for a, b in zip(new, old, strict=True):
            if a.shape != b.shape:
                return f"outputs of shape {b.shape[1:]} into {a.shape[1:]}"
        most = [_allowed(leaf) for leaf in jax.tree.leaves(wanted[:1])]
        if all(map(_close, new, old, most)):
            return ""
        with_rounding = _all_rounded(self._params)
        moved = [outputs_of(self._net_fn, with_rounding, batch) for batch in inputs]
        for a, b, c, allowed in zip(new, old, _stacked(moved), most, strict=True):
            largest = _largest(b, c != b) or _largest(b, a != b) or 1.0
            off, own = _off(a, b) / largest, ROUNDED * _off(c, b) / largest
            # A deep network may round as much by itself.
            if not (off <= allowed or off <= min(own, rounded)):
                return (
                    f"outputs by {off:.2g} of the largest, expected at most {allowed:g}"
                )
        return ""


def _stacked(batches: Sequence[Any]) -> list[np.ndarray]:
    """Each output of all batches, in 64 bits, with an axis of batches before others."""
    leaves = zip(*map(jax.tree.leaves, batches), strict=True)
    return [np.stack([*map(_wide, own)]) for own in leaves]


def _close(new: np.ndarray, old: np.ndarray, allowed: float) -> bool:
    """Whether the difference is small beside the largest of those that differ."""
    return bool(_off(new, old) <= allowed * _largest(old, new != old))


def _may_not_end(jaxpr: Jaxpr) -> bool:
    """Whether a program has a loop whose rounds are not counted."""
    return any(
        equation.primitive.name == "while"
        or any(map(_may_not_end, inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def _others(inputs: Any) -> Iterator[Any]:
    """Batches with other numbers: smaller ones of the same signs, then of any sign.

    Numbers without an axis, such as the size of a step, stay.
    """
    leaves, tree = jax.tree.flatten(inputs)
    examples = max([np.shape(leaf)[0] for leaf in leaves if np.ndim(leaf)], default=1)
    chance = np.random.default_rng(0)
    if not any(map(_is_real, leaves)):
        return
    for least in (0.0, -1.0) * -(-EXAMPLES // max(examples, 1)):
        new = []
        for leaf in leaves:
            if _is_real(leaf):
                factor = chance.uniform(least, 1.0, np.shape(leaf))
                values = np.asarray(leaf, np.float64)
                values = np.where(values == 0, factor, values * factor)
                own = values.astype(leaf.dtype)
                # Where the given array has to lie, if it has to lie anywhere.
                if isinstance(leaf, jax.Array):
                    own = jax.device_put(own, leaf.sharding if leaf.committed else None)
                leaf = own
            new.append(leaf)
        yield jax.tree.unflatten(tree, new)


def _is_real(leaf: Any) -> bool:
    """Whether a leaf holds real numbers of examples.

    An array of weak type does not count, for NumPy would not keep that.
    """
    dtype = getattr(leaf, "dtype", None)
    real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return real and np.ndim(leaf) > 0 and not getattr(leaf, "weak_type", False)


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
