"""What each axis of a weight is to a function, from its jaxpr.

The function is traced, and the products of its tensors with activations say which axes
are inputs, outputs and stacked layers
(:mod:`woodfisher_jax.tracing.dimensions.occurrences`). So names and shapes say nothing,
and any layout is right: (out, in), transposed convolutions, layers stacked by ``scan``
and ``vmap``, fused projections.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jax.extend.core import Jaxpr
from jax.tree_util import Partial

from woodfisher_jax.tracing.dimensions.occurrences import Walk
from woodfisher_jax.tracing.dimensions.products import Hidden, Occurrence
from woodfisher_jax.tracing.training_mode import called_with, explained
from woodfisher_jax.trees.axes import WeightAxes, conventional
from woodfisher_jax.trees.paths import Params, leaves_by_path


def find_axes(
    f: Callable[[Params, Any], Any], params: Params, batch: Any
) -> dict[str, WeightAxes]:
    """The axes of every tensor that a function multiplies with activations.

    Nothing is executed. Calls, ``scan``, loops and branches are followed; so are
    tensors that are scaled, normalised or combined before they are used.

    Args:
        f: (params, batch) -> any pytree, such as the loss.
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: The same, with one example or more.

    Returns:
        From path to axes, for weights of dense layers and convolutions alone: not for
        biases, normalisation, embeddings and positions. Where a product could not be
        followed, is made by hand as in ``sum(x * w, -1)``, or contradicts another one,
        ``doubt`` says so.

    Example:
        >>> params = {"w": jnp.ones((3, 2)), "bias": jnp.ones(3)}
        >>> params["table"] = jnp.ones((5, 2))
        >>> def net(params, tokens):
        ...     return params["table"][tokens] @ params["w"].T + params["bias"]
        >>> axes = wf.find_axes(net, params, jnp.zeros(4, int))
        >>> list(axes), axes["w"].roles
        (['w'], 'oi')
    """
    return traced(f, params, batch).axes()


@jax.jit
def _applied(f: Partial, params: Params, batch: Any) -> Any:
    return f(params, batch)


_TRACES: WeakKeyDictionary[Jaxpr, "Trace"] = WeakKeyDictionary()
"""Of programs, as long as JAX keeps them."""


def program_of(f: Callable[[Params, Any], Any], params: Params, batch: Any) -> Any:
    """The jaxpr of a function; the same object for the same function and shapes.

    Args:
        f: As for :func:`find_axes`.
        params: As for :func:`find_axes`.
        batch: As for :func:`find_axes`.
    """
    # By jit, which keeps it.
    return _applied.trace(_as_partial(f), params, batch).jaxpr.jaxpr


def _as_partial(f: Callable[..., Any]) -> Partial:
    return f if isinstance(f, Partial) else Partial(_hashable(f))


def _hashable(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function as jit takes it: an object with arrays in it has no hash."""
    try:
        hash(f)
    except TypeError:
        return lambda params, batch: f(params, batch)
    return f


def traced(
    f: Callable[[Params, Any], Any], params: Params, batch: Any, name: str = "f"
) -> "Trace":
    """Walks the program of a function; see :func:`find_axes`.

    A function that was walked with the same shapes is not traced again.

    Args:
        f: As for :func:`find_axes`.
        params: As for :func:`find_axes`.
        batch: As for :func:`find_axes`.
        name: Of the caller's argument that ``f`` is, for messages.
    """
    given = _as_partial(f)
    with called_with(name, batch), explained():
        program = program_of(given, params, batch)
    if program in _TRACES:
        return _TRACES[program]
    walk = Walk({p: np.shape(leaf) for p, leaf in leaves_by_path(params).items()})
    constants = len(jax.tree.leaves(given))
    held = [walk.origins.fresh(v.aval.shape) for v in program.invars[:constants]]
    arguments = [*held, *walk.origins.tensors()]
    for variable in program.invars[len(arguments) :]:
        arguments.append(walk.origins.fresh(variable.aval.shape, active=True))
    walk.follow(program, arguments, 1)
    trace = Trace(walk)
    _TRACES[program] = trace
    return trace


class Trace:
    """What the products of a program say of its tensors.

    Attributes:
        uses: Products, and tensors in products that cannot be followed, in order.
    """

    def __init__(self, walk: Walk) -> None:
        """Keeps what was found.

        Args:
            walk: That is done.
        """
        self._walk, self._origins, self.uses = walk, walk.origins, walk.products.uses

    def occurrences(self, path: str) -> list[Occurrence]:
        """The products of a tensor."""
        return [u for u in self.uses if isinstance(u, Occurrence) and u.path == path]

    def hidden(self, path: str) -> str:
        """Why a product of a tensor cannot be followed; "" where all are."""
        own = (u for u in self.uses if isinstance(u, Hidden) and u.path == path)
        return next((use.reason for use in own), "")

    def axes(self) -> dict[str, WeightAxes]:
        """The axes of all tensors that are in some product."""
        found = {path: self.axes_of(path) for path in self._origins.raw}
        return {path: axes for path, axes in found.items() if axes is not None}

    def all_axes(self) -> dict[str, WeightAxes]:
        """The same, and in doubt those of other tensors that are read."""
        other = "is in no product with activations that can be followed"
        return {
            path: conventional(path, self._origins.shapes[path])._replace(doubt=other)
            for path in self._origins.raw
            if path in self._walk.read and 0 not in self._origins.shapes[path]
        } | self.axes()

    def unused(self) -> tuple[str, ...]:
        """Tensors of two or more dimensions that no equation reads."""
        return tuple(
            path
            for path, shape in self._origins.shapes.items()
            if len(shape) > 1 and 0 not in shape and path not in self._walk.read
        )

    def axes_of(self, path: str) -> WeightAxes | None:
        """The axes of a tensor; None if it is in no product, or has no entry."""
        shape, hidden = self._origins.shapes[path], self.hidden(path)
        if 0 in shape:
            return None
        own = [product for product in self.occurrences(path) if not product.factor]
        found = [self._layout(path, product.roles) for product in own]
        if hidden:
            return conventional(path, shape)._replace(doubt=hidden, multiplied=False)
        if not found:
            return None
        if len(set(found)) > 1:
            many = f"is in {len(found)} products, whose inputs are different axes"
            return conventional(path, shape)._replace(doubt=many)
        cut, roles = found[0]
        if not roles:
            part = "has an axis that no product tells a role of"
            return conventional(path, shape)._replace(doubt=part)
        if not {"i", "k"} & set(roles):
            # A factor on the outputs of another tensor.
            return None
        heads, attention = self._heads(path, roles)
        return _merged_parts(self._origins.shapes[path], cut, roles, heads, attention)

    def _layout(self, path: str, roles: dict[int, str]) -> tuple[tuple[int, ...], str]:
        """The tensor's shape cut by roles, and their letters; "" if one is missing."""
        letters = ""
        cut: list[int] = []
        for leaf, above in self._origins.own_leaves(path):
            size = self._origins.dims.sizes[leaf]
            # An axis of length 1 may have been dropped on the way; it is of any role.
            role = next(
                (roles[d] for d in above if d in roles), "k" if size == 1 else ""
            )
            if not role:
                return self._origins.shapes[path], ""
            letters, cut = letters + role, [*cut, size]
        return tuple(cut), letters

    def _heads(self, path: str, roles: str) -> tuple[tuple[int, ...], str]:
        """Which axes count heads, and the name of the attention layer.

        Products of queries and keys, and then of what comes from them and values, keep
        heads apart. Queries that share keys have more than the keys have: what all
        share counts.
        """
        apart = self._apart()
        found: dict[int, tuple[int, ...]] = {}
        for i, (leaf, above) in enumerate(self._origins.own_leaves(path)):
            class_ = self._origins.dims.class_of(leaf)
            if (
                class_ in apart
                and roles[i] in "oi"
                and not self._walk.views.torn & {*above}
            ):
                found[class_] = (*found.get(class_, ()), i)
        if not found:
            return (), ""
        shared = {class_: self._sharers(class_) for class_ in found}
        most = max(map(len, shared.values()))
        classes = [class_ for class_, paths in shared.items() if len(paths) == most]
        axes = tuple(sorted(i for class_ in classes for i in found[class_]))
        return axes, shared[classes[0]][0]

    def _apart(self) -> set[int]:
        """The classes that two products of activations, one after another, keep."""

        def classes(dims: frozenset[int]) -> set[int]:
            leaves = (leaf for dim in dims for leaf in self._origins.dims.leaves(dim))
            return {self._origins.dims.class_of(leaf) for leaf in leaves}

        return set().union(
            *(classes(a) & classes(b) for a, b in self._walk.products.chains)
        )

    def _sharers(self, class_: int) -> list[str]:
        """The tensors that have a dimension of a class."""
        of = self._origins.dims.class_of
        # Asking for leaves may unify classes, so that this one has another number then.
        return [
            path
            for path in self._origins.raw
            if any(of(leaf) == of(class_) for leaf, _ in self._origins.own_leaves(path))
        ]


def _merged_parts(
    shape: tuple[int, ...],
    cut: tuple[int, ...],
    roles: str,
    heads: tuple[int, ...],
    attention: str,
) -> WeightAxes:
    """The axes with parts joined that lie in one axis and have one role."""
    sizes: list[int] = []
    letters, counted, part = "", [], 0
    for length in shape:
        begun = len(sizes)
        left = length
        while left > 1 or len(sizes) == begun:
            same = len(sizes) > begun and letters[-1] == roles[part]
            if same and not {part, part - 1} & {*heads}:
                sizes[-1] *= cut[part]
            else:
                sizes.append(cut[part])
                letters += roles[part]
            if part in heads:
                counted.append(len(sizes) - 1)
            left //= cut[part]
            part += 1
    return WeightAxes(tuple(sizes), letters, tuple(counted), attention)
