"""Structures taken out of a network that a mask has emptied."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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
from woodfisher_jax.shrinking.comparison import Comparison, any_nan
from woodfisher_jax.shrinking.constants import folded
from woodfisher_jax.tracing.batch_statistics import training_mode
from woodfisher_jax.tracing.coupling import coupled
from woodfisher_jax.tracing.smaller import Smaller
from woodfisher_jax.trees.masks import MasksLike, apply_masks, check_masks
from woodfisher_jax.trees.paths import Params, leaves_by_path

NetFn = Callable[[Params, Any], Any]


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
        inputs: One batch. Outputs are compared on it, and on other numbers in the
            places of its floating-point ones.

    Returns:
        A pytree like ``params`` with smaller arrays, as :func:`woodfisher_jax.prune`
        returns them.

    Raises:
        ValueError: If outputs would change by more than 1e-5 of the largest that
            depends on ``params`` and than rounding explains, or ``net_fn`` does not run
            with the smaller arrays; what and why.

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
    try:
        change = taken.comparison.change(net_fn, taken.small)
    except Exception as error:
        raise OptionError(
            "net_fn",
            f"net_fn does not run with {_counted(taken.gone)} taken out "
            f"({_first_line(error)}); expected a function that takes all shapes from "
            "params: without widths or places of a split in its code, as a Linen "
            "module has them, and with statistics of batch norms in params"
            f"{_also(net_fn, taken)}",
        ) from error
    if change:
        raise _changed(
            taken,
            change,
            "net_fn run with the smaller arrays; expected a function without numbers "
            f"that depend on their shapes{_also(net_fn, taken)}",
        )
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
    function = _Smaller(net_fn, taken)
    change = taken.comparison.change(function, taken.small)
    if change:
        raise _changed(
            taken,
            change,
            "the program traced from net_fn, made smaller; expected structures that "
            "contribute nothing, or the same for all inputs, where masks are zero",
        )
    return function, taken.small


class _Taken(NamedTuple):
    """What is left of a network.

    Attributes:
        found: Its structures.
        gone: Units of those that are taken out.
        small: Smaller parameters.
        comparison: With the masked network.
    """

    found: Structures
    gone: set[int]
    small: Params
    comparison: Comparison


class _Smaller:
    """A function whose program runs on smaller arrays."""

    def __init__(self, net_fn: NetFn, taken: _Taken) -> None:
        self._net_fn = net_fn
        axes = taken.found.coupling.weights
        self._shapes = {path: tuple(map(len, own)) for path, own in axes.items()}
        self._given = jax.eval_shape(lambda: taken.small)
        # By entries of tensors, for other inputs have other units.
        self._places = [
            (member.path, member.axis, int(member.entries[i, 0]))
            for family in taken.found.families
            for i, unit in enumerate(family.units)
            if unit in taken.gone
            for member in family.members[:1]
        ]

    def __call__(self, params: Params, inputs: Any) -> Any:
        """Evaluates the program, which is traced anew for each shape of inputs."""
        given = jax.eval_shape(lambda: inputs)
        whole = self._whole(params)
        coupling = coupled(self._net_fn, whole, given)
        gone = {
            unit
            for path, axis, entry in self._places
            for unit in coupling.units.classes(coupling.weights[path][axis][entry])
            if not coupling.units.reason(unit)
        }
        tree = jax.tree.structure(jax.eval_shape(self._net_fn, whole, given))
        leaves = jax.tree.leaves((params, inputs))
        return jax.tree.unflatten(tree, Smaller(coupling, gone)(leaves))

    def _whole(self, params: Params) -> Params:
        """The shapes before anything was taken out, of the types that are given.

        Raises:
            OptionError: If there are other arrays than those that were made smaller.
        """
        own = leaves_by_path(jax.eval_shape(lambda: params))
        expected = leaves_by_path(self._given)
        for path in dict.fromkeys([*expected, *own]):
            got, wanted = (
                leaves[path].shape if path in leaves else "nothing"
                for leaves in (own, expected)
            )
            if got != wanted:
                raise OptionError(
                    "params",
                    f"params has {got} at {path!r}, expected {wanted}: the second "
                    "result of wf.shrunk, with numbers of any type",
                )
        whole = [
            jax.ShapeDtypeStruct(shape, own[path].dtype, weak_type=own[path].weak_type)
            for path, shape in self._shapes.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(self._given), whole)


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
        leaves |= folded(net_fn, params, inputs, found, constant & gone)
    smaller = Smaller(found.coupling, gone)
    small = []
    for path, axes in found.coupling.weights.items():
        leaf = leaves[path]
        if smaller.shape(axes) != leaf.shape:
            # By NumPy, for XLA would compile a function for each shape, as it would
            # for jnp.asarray.
            leaf = smaller.cut(np.asarray(leaf), axes)
        small.append(leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf))
    comparison = Comparison(net_fn, params, inputs)
    if any_nan(comparison.wanted):
        wrong = named_not_finite(params)
        cause = f"look for NaN or infinity in {wrong}"
        if not wrong:
            cause = "a weight that is all zero may be divided by its norm"
        raise OptionError(
            "params" if wrong else "masks",
            "outputs are NaN under these masks, so that those of a smaller network "
            f"cannot be compared; {cause}",
        )
    tree = jax.tree.structure(params)
    return _Taken(found, gone, jax.tree.unflatten(tree, small), comparison)


def _one_left(found: Structures, gone: set[int]) -> set[int]:
    """What goes, if one structure of each family stays."""
    for family in found.families:
        if gone.issuperset(family.units):
            gone = gone - {family.units[0]}
    return gone


def _counted(gone: set[int]) -> str:
    return f"{len(gone)} structure{'s' if len(gone) > 1 else ''}"


def _changed(taken: _Taken, change: str, source: str) -> OptionError:
    names = taken.found.names(taken.gone)
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return OptionError(
        "masks",
        f"taking {_counted(taken.gone)} out of {names[:3]}{more} "
        f"changes {change}, by {source}",
    )


def _also(net_fn: NetFn, taken: _Taken) -> str:
    """What to do in place of wf.shrink, if it would help."""
    try:
        fails = taken.comparison.change(_Smaller(net_fn, taken), taken.small)
    except Exception:
        # Whatever it is, net_fn or its program: the first error is the one to read.
        return ""
    return "" if fails else "; wf.shrunk returns a function that runs them all the same"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
