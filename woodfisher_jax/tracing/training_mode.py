"""Errors of a caller's function: of a network in training mode, and all others."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from woodfisher_jax.options import OptionError, shown

_REMEDIES = {
    r"needs PRNG for": (
        "dropout is on; apply the network in evaluation mode, such as "
        "model.apply(variables, x, train=False) with deterministic=not train"
    ),
    r"^ModifyScopeVariableError": (
        "batch norm updates its statistics; apply the network in evaluation mode, such "
        "as model.apply(variables, x, train=False) with use_running_average=not train"
    ),
    r"^ScopeCollectionNotFound": (
        "the network has statistics beside its parameters; pass both, "
        'model.apply({"params": params, "batch_stats": batch_stats}, x)'
    ),
    r"^TraceContextError": (
        "a model of NNX changes while it is traced; call model.eval(), split it, "
        "graph, params, rest = nnx.split(model, nnx.Param, ...), and use "
        "nnx.merge(graph, params, rest) within the function"
    ),
    r"Dropout requires a key": (
        "dropout is on; take model = eqx.nn.inference_mode(model)"
    ),
    r"unbound axis name": (
        "batch norm takes means over a batch that has no name; take model = "
        "eqx.nn.inference_mode(model), or name the axis for training mode, "
        'jax.vmap(..., axis_name="batch")'
    ),
    r"missing .* argument: 'state'": (
        "the network has a state; pass it and leave the new one, "
        "jax.vmap(model, in_axes=(0, None))(x, state)[0]"
    ),
    r"'tuple' object|fixed-type tuple": (
        "if the network returns (outputs, state), as with mutable=... or in Equinox, "
        "take the outputs alone"
    ),
}
"""By what the frameworks say, after the name of the exception."""

_TRACED = (
    (
        jax.errors.TracerArrayConversionError,
        "{name} gives an array to NumPy, which JAX cannot while it traces; expected "
        "jax.numpy in place of numpy, as in jnp.tanh(x)",
    ),
    (
        jax.errors.ConcretizationTypeError,
        "{name} decides in Python by values of an array, which are not known while JAX "
        "traces; expected jnp.where or lax.cond in place of if, and static numbers in "
        "place of int(x) and float(x)",
    ),
)
"""What is wrong and expected instead, by what JAX raises."""

_NOTE = "woodfisher_jax: "
"""How a note of this package starts."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Adds a note to an error that a network in training mode causes.

    The exception is the framework's own; frameworks are recognised by their messages,
    since none of them need be installed.
    """
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        for pattern, remedy in _REMEDIES.items():
            if re.search(pattern, text):
                error.add_note(f"{_NOTE}{remedy} (docs/batch_norm.md)")
                break
        raise


def expected_of(name: str, error: Exception) -> str | None:
    """What a caller's function has to be, where its error tells that.

    Args:
        name: Of the argument that is the function.
        error: That it raised.

    Returns:
        A clause; None if what it is called with may be wrong as well.
    """
    for kind, text in _TRACED:
        if isinstance(error, kind):
            return text.format(name=name)
    if re.search(r"missing \d+ required positional argument", str(error)):
        return (
            f"{name} is called with two arguments; expected (params, batch): take "
            "several arrays as one tuple, such as lambda params, batch: "
            "net(params, *batch)"
        )
    return None


@contextlib.contextmanager
def called_with(name: str, batch: Any, remark: str = "") -> Iterator[None]:
    """Says what a caller's function was given when it failed.

    Args:
        name: Of the argument that is the function.
        batch: What it is called with beside params.
        remark: On what it is called with, at the end of the message; default none.

    Raises:
        OptionError: Caused by the error of the function, unless :func:`explained` has
            said already what to do.
    """
    try:
        yield
    except OptionError:
        raise
    except Exception as error:
        if any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            raise
        first_line = str(error).partition("\n")[0]
        expected = expected_of(name, error) or (
            "expected examples along the first axis of each array, and beyond it what "
            f"{name} takes with these params: call jax.jit({name}) on them to see "
            f"where it fails{remark}"
        )
        raise OptionError(
            name,
            f"{name} fails on {types_and_shapes(batch)} ({type(error).__name__}: "
            f"{first_line}); {expected}",
        ) from error


def types_and_shapes(batch: Any) -> str:
    """The arrays of a batch by type and shape."""

    def kind(leaf: Any) -> str:
        if not hasattr(leaf, "shape"):
            return f"a {type(leaf).__name__}"
        return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"

    found = jax.tree.map(kind, batch)
    return found if isinstance(found, str) else shown(found)
