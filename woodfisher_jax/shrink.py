"""Structures taken out of a network that a mask has emptied."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.info import PruneWarning
from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.inputs import (
    check_concrete,
    check_net,
    check_no_shapes,
    named_not_finite,
)
from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.tracing.batch_statistics import training_mode
from woodfisher_jax.tracing.coupling import coupled
from woodfisher_jax.tracing.entries.units import Array
from woodfisher_jax.tracing.flat import bind
from woodfisher_jax.tracing.layers import Bias, Other, Product, feature_axes, find_uses
from woodfisher_jax.tracing.primitives import Position
from woodfisher_jax.tracing.smaller import Smaller
from woodfisher_jax.trees.masks import MasksLike, apply_masks, check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path

NetFn = Callable[[Params, Any], Any]

TOLERANCE = 1e-5
"""Of outputs, relative to the largest one."""

ROUNDED = 4
"""As many roundings of the outputs' own type, where that is coarser."""

SAME = 1e-5
"""Of what is to be the same for all inputs, relative to the largest."""


def shrink(net_fn: NetFn, params: Params, masks: MasksLike, inputs: Any) -> Params:
    """Takes out of a network what its masks have emptied; its outputs stay.

    A channel, neuron or head goes if all that reads it is zero, or all that makes it:
    what it then contributes, for it is the same for all inputs, is added to the next
    bias, or taken from the mean of the next batch norm. One structure of each kind
    stays, so that no array is empty.

    Args:
        net_fn: (params, inputs) -> outputs, in evaluation mode; it takes the shapes of
            its layers from ``params``. For one that does not see :func:`shrunk`.
        params: Any pytree of arrays, such as ``wf.prune`` returned with the masks,
            which are applied to it.
        masks: From path to bool, or a pytree of the structure of ``params``, as
            ``wf.prune`` and ``wf.prune_layerwise`` with ``pattern="structures"`` return
            them.
        inputs: One batch, on which outputs are compared.

    Returns:
        A pytree like ``params`` with smaller arrays, as :func:`woodfisher_jax.prune`
        returns them.

    Raises:
        ValueError: If outputs would change by more than 1e-5 of the largest and than
            rounding explains, or ``net_fn`` does not run with the smaller arrays; what
            and why.

    Example:
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["a"]) @ params["c"]
        >>> params = {"a": jnp.ones((3, 4)), "c": jnp.ones((4, 2))}
        >>> masks = {"c": jnp.ones((4, 2), bool).at[1].set(False)}
        >>> small = wf.shrink(net, params, masks, jnp.ones((1, 3)))
        >>> small["a"].shape, small["c"].shape
        ((3, 3), (3, 2))
    """
    check_concrete("wf.shrink", net_fn, params, masks, inputs)
    taken = _taken_out(net_fn, params, masks, inputs)
    other = "wf.shrunk returns a function that runs them all the same"
    try:
        outputs = _outputs(net_fn, taken.small, inputs)
    except Exception as error:
        raise OptionError(
            "net_fn",
            f"net_fn does not run with {_counted(taken.gone)} taken out "
            f"({_first_line(error)}); expected a function that takes all shapes from "
            "params: without widths or places of a split in its code, as a Linen "
            f"module has them, and with statistics of batch norms in params; {other}",
        ) from error
    _check_same(outputs, taken, f"net_fn run with the smaller arrays; {other}")
    return taken.small


def shrunk(
    net_fn: NetFn, params: Params, masks: MasksLike, inputs: Any
) -> tuple[NetFn, Params]:
    """The same with a function that runs the smaller arrays, whatever net_fn does.

    The function evaluates the program of ``net_fn`` with the new shapes: so arrays that
    ``net_fn`` holds itself and numbers of heads or groups in its code do not matter.
    Derivative rules of its own (``jax.custom_vjp``) are those of the operations inside.

    Args:
        net_fn: (params, inputs) -> outputs, in evaluation mode.
        params: As for :func:`shrink`.
        masks: As for :func:`shrink`.
        inputs: As for :func:`shrink`.

    Returns:
        ``(small_fn, small_params)``; the function takes inputs of any batch size.

    Raises:
        ValueError: As for :func:`shrink`.

    Example:
        >>> scale = jnp.arange(4.0)
        >>> def net(params, x):
        ...     return (x @ params["a"] * scale) @ params["c"]
        >>> params = {"a": jnp.ones((3, 4)), "c": jnp.ones((4, 2))}
        >>> masks = {"c": jnp.ones((4, 2), bool).at[1].set(False)}
        >>> small_net, small = wf.shrunk(net, params, masks, jnp.ones((1, 3)))
        >>> small["a"].shape, small_net(small, jnp.ones((2, 3))).tolist()
        ((3, 3), [[15.0, 15.0], [15.0, 15.0]])
    """
    check_concrete("wf.shrunk", net_fn, params, masks, inputs)
    taken = _taken_out(net_fn, params, masks, inputs)
    function = _Smaller(net_fn, params, taken.found, taken.gone)
    outputs = _outputs(function, taken.small, inputs)
    _check_same(outputs, taken, "the program traced from net_fn, made smaller")
    return function, taken.small


class _Taken(NamedTuple):
    """What is left of a network.

    Attributes:
        found: Its structures.
        gone: Units of those that are taken out.
        small: Smaller parameters.
        wanted: Outputs of the masked network.
        rounding: How far these change when its parameters are rounded otherwise,
            relative to the largest.
    """

    found: Structures
    gone: set[int]
    small: Params
    wanted: Any
    rounding: Callable[[], float]


class _Smaller:
    """A function whose program runs on smaller arrays."""

    def __init__(
        self, net_fn: NetFn, params: Params, found: Structures, gone: set[int]
    ) -> None:
        self._net_fn = net_fn
        self._shapes = jax.eval_shape(lambda: params)
        # By entries of tensors, for other inputs have other units.
        self._places = [
            (member.path, member.axis, int(member.entries[i, 0]))
            for family in found.families
            for i, unit in enumerate(family.units)
            if unit in gone
            for member in family.members[:1]
        ]

    def __call__(self, params: Params, inputs: Any) -> Any:
        """Evaluates the program, which is traced anew for each shape of inputs."""
        given = jax.eval_shape(lambda: inputs)
        coupling = coupled(self._net_fn, self._shapes, given)
        gone = {
            unit
            for path, axis, entry in self._places
            for unit in coupling.units.classes(coupling.weights[path][axis][entry])
            if not coupling.units.reason(unit)
        }
        tree = jax.tree.structure(jax.eval_shape(self._net_fn, self._shapes, given))
        leaves = jax.tree.leaves((params, inputs))
        return jax.tree.unflatten(tree, Smaller(coupling, gone)(leaves))


def _two(inputs: Any) -> Any:
    return jax.tree.map(lambda a: a[:2] if np.ndim(a) else a, inputs)


def _taken_out(net_fn: NetFn, params: Params, masks: MasksLike, inputs: Any) -> _Taken:
    """Takes out what masks have emptied, not compared yet."""
    check_net(net_fn)
    dtypes = {getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(params)}
    if dtypes == {np.dtype(bool)}:
        raise OptionError(
            "params",
            "params has booleans alone, as masks have; expected the weights of the "
            "network: the arguments are net_fn, params, masks, inputs",
        )
    check_no_shapes(params)
    check_masks(params, masks)
    for text in training_mode("net_fn", net_fn, params, _two(inputs)):
        # The caller's line: shrink or shrunk is in between.
        warnings.warn(text, PruneWarning, stacklevel=4)
    params = apply_masks(params, masks)
    found = structures(net_fn, params, inputs)
    leaves = leaves_by_path(params)
    weights = {m.path for family in found.families for m in family.members if m.role}
    nonzero = {path: np.asarray(leaves[path]) != 0 for path in weights}
    unread = found.gone(nonzero, "inputs")
    constant = found.gone(nonzero, "outputs") - unread
    gone = _one_left(found, unread | constant)
    if constant & gone:
        leaves |= _folded(net_fn, params, inputs, found, constant & gone)
    smaller = Smaller(found.coupling, gone)
    small = []
    for path, axes in found.coupling.weights.items():
        leaf = leaves[path]
        if smaller.shape(axes) != leaf.shape:
            # By NumPy, for XLA would compile a function for each shape, as it would
            # for jnp.asarray.
            leaf = smaller.cut(np.asarray(leaf), axes)
        small.append(leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf))
    wanted = _outputs(net_fn, params, inputs)
    if any(np.isnan(_wide(leaf)).any() for leaf in jax.tree.leaves(wanted)):
        wrong = named_not_finite(params)
        cause = f"look for NaN or infinity in {wrong}"
        if not wrong:
            cause = "a weight that is all zero may be divided by its norm"
        raise OptionError(
            "params" if wrong else "masks",
            "outputs are NaN under these masks, so that those of a smaller network "
            f"cannot be compared; {cause}",
        )

    def rounding() -> float:
        off = _outputs(net_fn, _all_rounded(params), inputs)
        return max(map(_difference, jax.tree.leaves(off), jax.tree.leaves(wanted)))

    tree = jax.tree.structure(params)
    small = jax.tree.unflatten(tree, small)
    return _Taken(found, gone, small, wanted, rounding)


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


def _outputs(net_fn: NetFn, params: Params, inputs: Any) -> Any:
    """A function's outputs, precise enough to compare on any device."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(net_fn)(params, inputs)


def _one_left(found: Structures, gone: set[int]) -> set[int]:
    """What goes, if one structure of each family stays."""
    for family in found.families:
        if gone.issuperset(family.units):
            gone = gone - {family.units[0]}
    return gone


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
        return OptionError(
            "masks",
            f"{sorted(_names(self.found, self.constant))} have outputs that are zero "
            f"under the masks, but what follows makes of them {reason}; expected masks "
            "that empty the weights that read them as well, as "
            "wf.prune(..., pattern='structures') gives them",
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


def _folded(
    net_fn: NetFn,
    params: Params,
    inputs: Any,
    found: Structures,
    constant: set[int],
) -> dict[str, jax.Array]:
    """Biases, and means of batch norms, with what structures contribute.

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


def _counted(gone: set[int]) -> str:
    return f"{len(gone)} structure{'s' if len(gone) > 1 else ''}"


def _listed(taken: _Taken) -> str:
    names = sorted(_names(taken.found, taken.gone))
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"{names[:3]}{more}"


def _names(found: Structures, gone: set[int]) -> set[str]:
    return {f.name for f in found.families if gone.intersection(f.units)}


def _check_same(outputs: Any, taken: _Taken, source: str) -> None:
    wanted = jax.tree.leaves(taken.wanted)
    for new, old in zip(jax.tree.leaves(outputs), wanted, strict=True):
        if new.shape != old.shape:
            change = f"outputs of shape {old.shape} into {new.shape}"
        else:
            off = _difference(new, old)
            most = max(TOLERANCE, ROUNDED * _precision(old))
            # A deep network may round as much by itself.
            if off <= most or off <= min(ROUNDED * taken.rounding(), 1e3 * TOLERANCE):
                continue
            change = f"outputs by {off:.2g} of the largest, expected at most {most:g}"
        raise OptionError(
            "masks",
            f"taking {_counted(taken.gone)} out of {_listed(taken)} "
            f"changes {change}, by {source}",
        )


def _precision(array: jax.Array) -> float:
    """The spacing of an array's numbers at 1; 0 of whole numbers."""
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    return float(jnp.finfo(array.dtype).eps) if inexact else 0.0


def _wide(array: jax.Array) -> np.ndarray:
    """The same numbers in 64 bits."""
    return np.asarray(array).astype(complex if jnp.iscomplexobj(array) else float)


def _difference(new: jax.Array, old: jax.Array) -> float:
    """The largest, relative to the largest finite entry."""
    a, b = _wide(new), _wide(old)
    largest = np.max(np.abs(b), where=np.isfinite(b), initial=0) or 1
    # Infinities, as of masked scores, are the same or not.
    off = np.abs(np.subtract(a, b, where=a != b, out=np.zeros_like(b)))
    return float(np.max(off, initial=0) / largest)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
