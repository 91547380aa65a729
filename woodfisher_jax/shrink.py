"""Structures taken out of a network that a mask has emptied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.structures import Structures, structures
from woodfisher_jax.tracing.coupling import Array, Place, coupled
from woodfisher_jax.tracing.flat import bind
from woodfisher_jax.tracing.layers import Bias, called, find_uses
from woodfisher_jax.tracing.smaller import Smaller
from woodfisher_jax.trees.masks import MasksLike, apply_masks, check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path
from woodfisher_jax.trees.samples import shapes_of

NetFn = Callable[[Params, Any], Any]

TOLERANCE = 1e-5
"""Of outputs, relative to the largest one."""


def shrink(net_fn: NetFn, params: Params, masks: MasksLike, inputs: Any) -> Params:
    """Takes out of a network what its masks have emptied; its outputs stay.

    A channel, neuron or head goes if all that reads it is zero, or all that makes it:
    what it then contributes, for it is the same for all inputs, is added to the next
    bias. One structure of each kind stays, so that no array is empty.

    Args:
        net_fn: (params, inputs) -> outputs, in evaluation mode; it takes the shapes of
            its layers from ``params``. For one that does not see :func:`shrunk`.
        params: Any pytree of arrays.
        masks: From path to bool, or a pytree of the structure of ``params``, as
            ``wf.prune(..., pattern="structures")`` and ``wf.prune_structures`` return
            them.
        inputs: One batch, on which outputs are compared.

    Returns:
        A pytree like ``params`` with smaller arrays.

    Raises:
        ValueError: If outputs would change by more than 1e-5 of the largest, or
            ``net_fn`` does not run with the smaller arrays; what and why.

    Example:
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["a"]) @ params["c"]
        >>> params = {"a": jnp.ones((3, 4)), "c": jnp.ones((4, 2))}
        >>> masks = {"c": jnp.ones((4, 2), bool).at[1].set(False)}
        >>> small = wf.shrink(net, params, masks, jnp.ones((1, 3)))
        >>> small["a"].shape, small["c"].shape
        ((3, 3), (3, 2))
    """
    found, gone, small, wanted = _taken_out(net_fn, params, masks, inputs)
    other = (
        "wf.shrunk returns a function that runs them, whatever net_fn takes its shapes "
        "from"
    )
    try:
        outputs = jax.jit(net_fn)(small, inputs)
    except Exception as error:
        raise OptionError(
            "net_fn",
            f"net_fn does not run with arrays from which {len(gone)} structures are "
            f"taken out ({_first_line(error)}); expected a function that takes all "
            "shapes from params, with statistics of batch norms among them, such as "
            f"model.apply(variables, x); {other}",
        ) from error
    _check_same(outputs, wanted, found, gone, f"net_fn's; {other}")
    return small


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
    found, gone, small, wanted = _taken_out(net_fn, params, masks, inputs)
    function = _Smaller(net_fn, params, found, gone)
    outputs = jax.jit(function)(small, inputs)
    _check_same(outputs, wanted, found, gone, "the program's")
    return function, small


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
        given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)
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


def _taken_out(
    net_fn: NetFn, params: Params, masks: MasksLike, inputs: Any
) -> tuple[Structures, set[int], Params, Any]:
    """Structures, which of them go, smaller parameters and the masked outputs."""
    check_masks(params, masks)
    params = apply_masks(params, masks)
    found = structures(net_fn, params, inputs)
    leaves = leaves_by_path(params)
    nonzero = {path: np.asarray(leaf) != 0 for path, leaf in leaves.items()}
    unread = found.gone(nonzero, "inputs")
    constant = found.gone(nonzero, "outputs") - unread
    gone = _one_left(found, unread | constant)
    if constant & gone:
        leaves |= _folded(net_fn, params, inputs, found, constant & gone)
    smaller = Smaller(found.coupling, gone)
    small = [
        smaller.cut(leaves[path], axes) for path, axes in found.coupling.weights.items()
    ]
    wanted = jax.jit(net_fn)(params, inputs)
    return found, gone, jax.tree.unflatten(jax.tree.structure(params), small), wanted


def _one_left(found: Structures, gone: set[int]) -> set[int]:
    """What goes, if one structure of each family stays."""
    for family in found.families:
        if gone.issuperset(family.units):
            gone = gone - {family.units[0]}
    return gone


def _folded(
    net_fn: NetFn,
    params: Params,
    inputs: Any,
    found: Structures,
    constant: set[int],
) -> dict[str, jax.Array]:
    """Biases with what structures contribute that are the same for all inputs.

    Raises:
        OptionError: If one is not, or there is no bias that could take it.
    """
    uses = find_uses(net_fn, params, shapes_of(inputs, found.examples))
    biases = {
        use.position: use
        for own in uses.values()
        for use in own
        if isinstance(use, Bias)
    }
    leaves = leaves_by_path(params)
    changed: dict[str, jax.Array] = {}
    equations = _equations(found)

    def watch(place: Place, operands: list[tuple[Any, Array]]) -> None:
        (x, array), (weight, other) = operands
        if not array.active or other.active:
            return
        equation = equations(place)
        along, features = _channels(equation)
        classes = found.coupling.units.classes
        chosen = np.array(
            [bool(constant.intersection(classes(e))) for e in array.axes[along]]
        )
        if not chosen.any():
            return
        shape = [-1 if i == along else 1 for i in range(x.ndim)]
        part = jnp.where(jnp.asarray(chosen).reshape(shape), x, 0)
        (given,) = bind(equation, [part, weight])
        given = jnp.moveaxis(given, features, -1).reshape(-1, given.shape[features])
        largest = float(jnp.max(jnp.abs(given)))
        if largest == 0:
            return
        names = sorted(_names(found, constant))
        if float(jnp.max(jnp.ptp(given, axis=0))) > 1e-6 * largest:
            raise OptionError(
                "masks",
                f"{names} have outputs that are zero under the masks, but what follows "
                "(a norm, a bias, padding) makes of them something that differs from "
                "place to place, which no bias can replace; expected masks that empty "
                "what reads them as well, such as wf.prune_structures gives",
            )
        bias = biases.get(place)
        if bias is None:
            raise OptionError(
                "masks",
                f"{names} have outputs that are zero under the masks, but what follows "
                "makes of them constants, and the layer that reads them has no bias to "
                "take these; expected masks that empty what reads them as well, such "
                "as wf.prune_structures gives",
            )
        old = changed.get(bias.path, leaves[bias.path])
        more = jnp.zeros(old.size).at[bias.entries].add(given.mean(0))
        changed[bias.path] = (old + more.reshape(old.shape)).astype(old.dtype)

    Smaller(found.coupling, set(), watch)(jax.tree.leaves((params, inputs)))
    return changed


def _equations(found: Structures) -> Callable[[Place], Any]:
    def at(place: Place) -> Any:
        jaxpr = found.coupling.program.jaxpr
        for i in place[:-1]:
            jaxpr = called(jaxpr.eqns[i])[0]
        return jaxpr.eqns[place[-1]]

    return at


def _channels(equation: Any) -> tuple[int, int]:
    """The axis of a product's activations that is summed, and that of its outputs."""
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "conv_general_dilated":
        return numbers.lhs_spec[1], numbers.out_spec[1]
    (summed, _), _ = numbers
    return summed[0], equation.outvars[0].aval.ndim - 1


def _names(found: Structures, gone: set[int]) -> set[str]:
    return {f.name for f in found.families if gone.intersection(f.units)}


def _check_same(
    outputs: Any, wanted: Any, found: Structures, gone: set[int], whose: str
) -> None:
    for new, old in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        largest = float(jnp.max(jnp.abs(old), initial=0.0)) or 1.0
        off = float(jnp.max(jnp.abs(new - old), initial=0.0)) / largest
        if not off <= TOLERANCE:
            raise OptionError(
                "masks",
                f"taking {len(gone)} structures out of {sorted(_names(found, gone))} "
                f"changes outputs by {off:.2g} of the largest, expected at most "
                f"{TOLERANCE:g}; these are {whose}",
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
