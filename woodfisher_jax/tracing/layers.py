"""Uses of each parameter: the dense layers and convolutions of a function.

A function of (params, batch) is traced to a jaxpr, and every parameter is followed to
the ``dot_general`` or ``conv_general_dilated`` that multiplies it with activations. So
no layer has to be registered, and Flax, Equinox and plain dicts are treated alike.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

from woodfisher_jax.tracing.primitives import (
    CALLS,
    PRODUCTS,
    RESHAPES,
    SAME,
    Position,
    called,
    contains_product,
)
from woodfisher_jax.trees.paths import Params, leaves_by_path

View = tuple
"""One of ("transpose", axes), ("reshape", shape), ("flip", axes), ("broadcast", shape,
axes) and ("slice", starts, stops, strides): the same numbers in other positions."""


class Dot(NamedTuple):
    """The axes of a ``dot_general``.

    Attributes:
        contract: Axes summed over, of the left and of the right operand.
        batch: Axes that both operands share with the output, of the left and the right.
    """

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]


class Convolution(NamedTuple):
    """The settings of a ``conv_general_dilated``, in JAX's terms.

    Attributes:
        strides: Window strides, one for each spatial axis.
        padding: Pairs (low, high).
        input_dilation: Above 1 in a transposed convolution.
        kernel_dilation: Distance between the taps of the kernel.
        axes: Axes of batch, features and space in input, kernel and output.
        groups: ``feature_group_count``.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    axes: jax.lax.ConvDimensionNumbers
    groups: int


class Product(NamedTuple):
    """A dense layer or a convolution: a weight tensor times activations. Hashable.

    Attributes:
        path: Path of the weight tensor.
        position: The equation.
        side: Operand of the weight, 0 or 1; the other operand has the activations.
        views: Views that turn the tensor into that operand.
        geometry: Axes of the sums.
        operands: Shapes of both operands.
        output: Shape and dtype of the result.
        rule: "custom_jvp_call" or "custom_vjp_call" if the equation is inside a
            function with a derivative rule of its own, else "".
    """

    path: str
    position: Position
    side: int
    views: tuple[View, ...]
    geometry: Dot | Convolution
    operands: tuple[tuple[int, ...], tuple[int, ...]]
    output: jax.ShapeDtypeStruct
    rule: str

    def anywhere(self) -> "Product":
        """The product without its place, so that equal layers share a program."""
        return self._replace(path="", position=(), views=(), rule="")


class Bias(NamedTuple):
    """A bias: added to the output of a layer, one entry for each output.

    Attributes:
        path: Path of the bias tensor.
        position: The equation of the layer.
        entries: Index into the flat bias for each output, int [outputs].
        alone: Whether nothing else reads that output, as a skip connection would.
    """

    path: str
    position: Position
    entries: np.ndarray
    alone: bool = True


class Other(NamedTuple):
    """A use that is neither layer nor bias.

    Attributes:
        path: Path of the tensor.
        primitive: The JAX primitive that combines the tensor with activations, or that
            changes it before a product with activations.
        hides_product: Whether the tensor is multiplied with activations in a way that
            is not followed: in a loop, or through a tensor computed from it.
        subtracted: The tensor as a bias, if it is subtracted from the output of a
            layer, as the mean of a batch norm is.
    """

    path: str
    primitive: str
    hides_product: bool
    subtracted: Bias | None = None

    @property
    def reason(self) -> str:
        """A clause for messages, with the tensor as its subject."""
        if self.hides_product:
            return (
                f"enters a product with activations inside or after {self.primitive!r}"
            )
        return f"meets activations in {self.primitive!r}"


Use = Product | Bias | Other


class _Value(NamedTuple):
    """Origin of an array in the jaxpr.

    Attributes:
        from_batch: Whether it depends on the batch.
        paths: The parameters that it depends on, if not on the batch.
        shape: Shape of the parameter, if it is a view of one.
        views: The views of that parameter.
        through: The first primitive that changed the numbers, if it is no view.
        product: The layer, if it is a view of a layer's output.
        features: Axes of that layer's outputs.
    """

    from_batch: bool = False
    paths: frozenset[str] = frozenset()
    shape: tuple[int, ...] | None = None
    views: tuple[View, ...] = ()
    through: str = ""
    product: Product | None = None
    features: tuple[int, ...] = ()


_ACTIVATION = _Value(from_batch=True)
_CONSTANT = _Value()
_RULES = ("custom_jvp_call", "custom_vjp_call")


def find_uses(
    f: Callable[[Params, Any], Any], params: Params, batch: Any
) -> dict[str, tuple[Use, ...]]:
    """Finds every use of every parameter together with activations.

    Nothing is executed. A tensor may be transposed, reshaped, broadcast, flipped or
    cast before its use, and calls (jit, remat, functions with custom derivatives) are
    followed. Loops, branches and tensors computed from others are not followed: they
    are returned as :class:`Other` with ``hides_product``.

    Args:
        f: (params, batch) -> any pytree.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: The same, with one example or more.

    Returns:
        From the path of each parameter to its uses in program order; empty if ``f``
        does not use it.
    """
    closed = jax.make_jaxpr(f)(params, batch)
    leaves = leaves_by_path(params)
    values = [
        _Value(paths=frozenset([path]), shape=tuple(leaf.shape))
        for path, leaf in leaves.items()
    ]
    values += [_ACTIVATION] * (len(closed.jaxpr.invars) - len(values))
    found: list[Use] = []
    reads: Counter[Position] = Counter()
    ends = _walk(closed.jaxpr, values, (), "", found, reads)
    reads.update(value.product.position for value in ends if value.product)

    def known(bias: Bias) -> Bias:
        return bias._replace(alone=reads[bias.position] == 1)

    for i, use in enumerate(found):
        if isinstance(use, Bias):
            found[i] = known(use)
        elif isinstance(use, Other) and use.subtracted is not None:
            found[i] = use._replace(subtracted=known(use.subtracted))
    return {path: tuple(u for u in found if u.path == path) for path in leaves}


def _walk(
    jaxpr: Jaxpr,
    arguments: Sequence[_Value],
    position: Position,
    rule: str,
    found: list[Use],
    reads: Counter[Position],
) -> list[_Value]:
    """Follows values through the equations of a jaxpr and records uses.

    Args:
        jaxpr: The equations.
        arguments: What goes in.
        position: Of the call.
        rule: As in :class:`Product`.
        found: Gets the uses.
        reads: Gets how many equations read the output of each layer, views of which
            are the same.
    """
    known = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Value:
        return _CONSTANT if isinstance(atom, Literal) else known.get(atom, _CONSTANT)

    for index, equation in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in equation.invars]
        here = (*position, index)
        name = equation.primitive.name
        if name in CALLS:
            inner, _ = called(equation)
            inside = name if name in _RULES else rule
            outputs = _walk(inner, inputs, here, inside, found, reads)
        elif name in PRODUCTS:
            outputs = [_multiplied(equation, inputs, here, rule, found)]
        elif name in SAME and len(inputs) == len(equation.outvars):
            outputs = inputs
        elif name in (*RESHAPES, "transpose", "rev", "slice") and len(inputs) == 1:
            outputs = [_placed(equation, inputs[0])]
        else:
            outputs = _computed(equation, inputs, found)
        known.update(zip(equation.outvars, outputs, strict=True))
        if name not in CALLS:
            kept = [value.product for value in outputs]
            reads.update(
                value.product.position
                for value in inputs
                if value.product and value.product not in kept
            )
    return [read(atom) for atom in jaxpr.outvars]


def _computed(
    equation: Any, inputs: Sequence[_Value], found: list[Use]
) -> list[_Value]:
    """The results of an equation that is neither layer nor view."""
    name = equation.primitive.name
    outputs = len(equation.outvars)
    if not any(value.from_batch for value in inputs):
        paths = frozenset().union(*(value.paths for value in inputs))
        through = next((value.through for value in inputs if value.through), name)
        return [_Value(paths=paths, through=through)] * outputs
    bias = _bias(equation, inputs) if name in ("add", "add_any", "sub") else None
    if bias is not None:
        minus = Other(bias.path, name, False, bias)
        found.append(minus if name == "sub" else bias)
        return [_ACTIVATION]
    hides = contains_product(equation)
    for value in inputs:
        found.extend(Other(path, name, hides) for path in sorted(value.paths))
    return [_ACTIVATION] * outputs


def _multiplied(
    equation: Any,
    inputs: Sequence[_Value],
    position: Position,
    rule: str,
    found: list[Use],
) -> _Value:
    """The result of a product, which is a layer if one operand is a parameter."""
    if not any(value.from_batch for value in inputs):
        return _computed(equation, inputs, found)[0]
    geometry = _geometry(equation)
    for side, value in enumerate(inputs):
        if not value.paths:
            continue
        as_image = isinstance(geometry, Convolution) and side == 0
        if value.shape is None or geometry is None or as_image:
            through = value.through or equation.primitive.name
            found.extend(Other(path, through, True) for path in sorted(value.paths))
            continue
        (path,) = value.paths
        left, right = (tuple(atom.aval.shape) for atom in equation.invars)
        output = equation.outvars[0].aval
        product = Product(
            path=path,
            position=position,
            side=side,
            views=value.views,
            geometry=geometry,
            operands=(left, right),
            output=jax.ShapeDtypeStruct(output.shape, output.dtype),
            rule=rule,
        )
        found.append(product)
        return _Value(True, product=product, features=feature_axes(product))
    return _ACTIVATION


def _geometry(equation: Any) -> Dot | Convolution | None:
    settings = equation.params
    if equation.primitive.name == "dot_general":
        (left, right), (left_batch, right_batch) = settings["dimension_numbers"]
        return Dot((tuple(left), tuple(right)), (tuple(left_batch), tuple(right_batch)))
    if settings["batch_group_count"] != 1:
        return None
    return Convolution(
        strides=tuple(settings["window_strides"]),
        padding=tuple(map(tuple, settings["padding"])),
        input_dilation=tuple(settings["lhs_dilation"]),
        kernel_dilation=tuple(settings["rhs_dilation"]),
        axes=settings["dimension_numbers"],
        groups=settings["feature_group_count"],
    )


def feature_axes(product: Product) -> tuple[int, ...]:
    """Axes of a layer's output along which the weights differ, groups first."""
    if isinstance(product.geometry, Convolution):
        return (product.geometry.axes.out_spec[1],)
    contract, batch = product.geometry
    groups, ndim = len(batch[0]), len(product.output.shape)
    # The output of a dot_general is (batch, rest of the left, rest of the right).
    middle = len(product.operands[0]) - len(contract[0])
    own = range(groups, middle) if product.side == 0 else range(middle, ndim)
    return (*range(groups), *own)


# ------------------------------------------------------------------------------ views


def _placed(equation: Any, value: _Value) -> _Value:
    """The result of a view of a value."""
    name, settings = equation.primitive.name, equation.params
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    view: View = ("reshape", tuple(new))
    if name == "transpose":
        view = ("transpose", tuple(settings["permutation"]))
    elif name == "rev":
        view = ("flip", tuple(settings["dimensions"]))
    elif name == "slice":
        strides = settings["strides"] or (1,) * len(old)
        view = (
            "slice",
            tuple(settings["start_indices"]),
            tuple(settings["limit_indices"]),
            tuple(strides),
        )
    elif name == "broadcast_in_dim":
        view = ("broadcast", tuple(new), tuple(settings["broadcast_dimensions"]))
    elif settings.get("dimensions") is not None and name == "reshape":
        return _computed(equation, [value], [])[0]
    if value.shape is not None:
        return value._replace(views=(*value.views, view))
    if value.product is None:
        return value
    moved = [_moved(axis, view, old, new) for axis in value.features]
    if any(axis is None for axis in moved):
        return _ACTIVATION
    return value._replace(features=tuple(axis for axis in moved if axis is not None))


def _moved(
    axis: int, view: View, old: tuple[int, ...], new: tuple[int, ...]
) -> int | None:
    """Position of an axis after a view; None if it is split, merged or repeated."""
    if view[0] == "transpose":
        return view[1].index(axis)
    if view[0] == "flip" or math.prod(old) != math.prod(new):
        return None
    before, length = math.prod(old[:axis]), old[axis]
    same = (
        i for i, n in enumerate(new) if n == length and math.prod(new[:i]) == before
    )
    return next(same, None)


def view_entries(shape: tuple[int, ...], views: Sequence[View]) -> np.ndarray:
    """Indices of a tensor's entries after some views.

    Args:
        shape: The tensor's shape.
        views: The views, in order.

    Returns:
        Indices into the flat tensor, an int array with the final shape.
    """
    entries = np.arange(math.prod(shape)).reshape(shape)
    for kind, *settings in views:
        if kind == "transpose":
            entries = np.transpose(entries, settings[0])
        elif kind == "flip":
            entries = np.flip(entries, settings[0])
        elif kind == "slice":
            entries = entries[tuple(map(slice, *settings))]
        elif kind == "reshape":
            entries = entries.reshape(settings[0])
        else:
            wide = [1] * len(settings[0])
            for axis, length in zip(settings[1], entries.shape, strict=True):
                wide[axis] = length
            entries = np.broadcast_to(entries.reshape(wide), settings[0])
    return entries


def _bias(equation: Any, inputs: Sequence[_Value]) -> Bias | None:
    """The bias of a layer, if this addition or subtraction is one."""
    total = equation.outvars[0].aval.shape
    for i, (output, bias) in enumerate((inputs, inputs[::-1])):
        same_shape = equation.invars[i].aval.shape == total
        if output.product is None or bias.shape is None or not same_shape:
            continue
        entries = np.broadcast_to(view_entries(bias.shape, bias.views), total)
        # Without a stride all entries along an axis are one and the same.
        shared = [
            stride == 0 or length == 1
            for stride, length in zip(entries.strides, total, strict=True)
        ]
        rest = [axis for axis in range(len(total)) if axis not in output.features]
        if not all(shared[axis] for axis in rest):
            continue
        own = np.transpose(entries, (*rest, *output.features))[(0,) * len(rest)]
        if own.size == math.prod(bias.shape) == len(np.unique(own)):
            (path,) = bias.paths
            return Bias(path, output.product.position, own.reshape(-1))
    return None
