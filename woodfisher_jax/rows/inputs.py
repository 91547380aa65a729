"""What a pruning step is given, checked: parameters, loss, samples, targets."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import Mesh

from woodfisher_jax.options import OptionError
from woodfisher_jax.rows.gradients import LossFn
from woodfisher_jax.rows.sharding import gathered, spans_processes
from woodfisher_jax.tracing.lookups import lookups
from woodfisher_jax.tracing.primitives import dependent
from woodfisher_jax.tracing.training_mode import (
    called_with,
    expected_of,
    explained,
    types_and_shapes,
)
from woodfisher_jax.trees.paths import Params, leaf_name, leaves_by_path
from woodfisher_jax.trees.samples import (
    Examples,
    batch_length,
    num_examples,
    regroup,
    shapes_of,
)
from woodfisher_jax.trees.vectors import not_finite

LARGEST = 1e15
"""Size of an output or target, so that sums of squares of many stay in float32."""


def check_concrete(caller: str, *trees: Any, instead: str = "") -> None:
    """Raises while JAX traces, since a driver takes decisions on the host.

    Args:
        caller: The function that was called, for the message.
        *trees: Of which no leaf may be traced.
        instead: What to call within ``jit``, if there is something.

    Raises:
        TypeError: With what to call instead.
    """
    # Not an iterator, which JAX warns of.
    leaves = jax.tree.leaves(trees, is_leaf=lambda node: isinstance(node, Iterator))
    # Zeros are traced under jit even where no argument is.
    if any(
        isinstance(leaf, jax.core.Tracer) for leaf in (jax.device_put(0.0), *leaves)
    ):
        raise TypeError(
            f"{caller} cannot run under jit, vmap or grad, since it is a driver: it "
            "reads the values of its arguments, and decides by them; call it outside"
            f"{instead}"
        )


def check_function(name: str, function: Any, takes: str) -> None:
    """Raises unless an argument is a function.

    Args:
        name: Of the argument.
        function: What was given.
        takes: Its arguments and result, for the message.

    Raises:
        OptionError: With the type that came.
    """
    if not callable(function):
        raise OptionError(
            name,
            f"{name} is of type {type(function).__name__}; expected a function {takes}",
        )


def check_net(net_fn: Any) -> None:
    """Raises unless a network is a function."""
    check_function("net_fn", net_fn, "(params, inputs) -> outputs")


def check_reads(program: Jaxpr, params: Params) -> None:
    """Raises unless a network returns arrays that depend on its parameters.

    Args:
        program: Of the network; its first variables are the parameters.
        params: Any pytree.

    Raises:
        OptionError: Naming ``net_fn``.
    """
    number = len(jax.tree.leaves(params))
    if not program.outvars:
        raise OptionError(
            "net_fn",
            "net_fn returns no array; expected the outputs of the network, such as "
            "logits [n, k]: a function without return gives None",
        )
    if not any(dependent(program, [i < number for i in range(len(program.invars))])):
        raise OptionError(
            "net_fn",
            "net_fn returns outputs that do not depend on params; expected a function "
            "that reads the weights from its first argument, not from a closure",
        )


def check_numbers(net_fn: Any, params: Params, batches: Sequence[Any]) -> None:
    """Raises if tokens, or other whole numbers, are outside the table they choose from.

    JAX itself takes another row, or NaN.

    Args:
        net_fn: (params, inputs) -> outputs.
        params: Its parameters.
        batches: Of its inputs, of one length.

    Raises:
        OptionError: Naming ``inputs``, the range, and the first number outside it.
    """
    found = lookups(net_fn, params, shapes_of(batches[0], batch_length(batches[0])))
    for lookup in found:
        done = 0
        for batch in batches:
            numbers = np.asarray(leaves_by_path(batch)[lookup.leaf])
            wrong = np.argwhere((numbers < 0) | (numbers >= lookup.rows))
            if len(wrong):
                place = tuple(map(int, wrong[0]))
                at = ", ".join(map(str, (done + place[0], *place[1:])))
                table = repr(lookup.table) if lookup.table else "a table of params"
                raise OptionError(
                    "inputs",
                    f"{leaf_name('inputs', lookup.leaf)} has {numbers[place]} at "
                    f"[{at}], which chooses a row of {table} with {lookup.rows} rows; "
                    f"expected whole numbers from 0 to {lookup.rows - 1}, such as "
                    "tokens of this network's own tokenizer: for others JAX takes some "
                    "other row, or NaN. Put a valid number where a mask hides it",
                )
            done += len(numbers)


def check_params(params: Params, reader: str = "loss_fn") -> None:
    """Raises unless there are leaves, and all are floating-point arrays.

    Args:
        params: Any pytree.
        reader: The argument that is the function of them, for the message.

    Raises:
        OptionError: If there are none.
        TypeError: With the path of the first other leaf.
    """
    leaves = leaves_by_path(params)
    if not leaves:
        raise OptionError(
            "params",
            f"params, of type {type(params).__name__}, has no arrays; expected the "
            "weights of a network, any pytree",
        )
    for path, leaf in leaves.items():
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            remedy = "Multiply quantized weights by their scales, and keep"
            if callable(leaf):
                remedy = (
                    "Of an Equinox module take the arrays, params, rest = "
                    "eqx.partition(model, eqx.is_inexact_array), and keep"
                )
            elif not hasattr(leaf, "dtype"):
                remedy = "Make weights arrays, as by np.asarray(numbers), and keep"
            raise TypeError(
                f"{leaf_name('params', path)} has type {kind}; expected floating-point "
                f"arrays only. {remedy} counters and indices out of params, in the "
                f"closure of {reader} for instance"
            )


def check_no_shapes(params: Params) -> None:
    """Raises where parameters are shapes alone.

    Raises:
        TypeError: With the path of the first.
    """
    for path, leaf in leaves_by_path(params).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{leaf_name('params', path)} is a jax.ShapeDtypeStruct; expected "
                "arrays (wf.structures and wf.plan_pruning take shapes as well)"
            )


def named_not_finite(params: Params) -> str:
    """Parameters that have NaN or infinity, for a message; "" where none has."""
    names = [leaf_name("params", path) for path in not_finite(params)]
    return " and ".join(names[:3]) + (", among others" if names[3:] else "")


def check_loss(loss_fn: LossFn | None, params: Params, samples: Any) -> LossFn:
    """Raises unless the loss of one example is a floating-point scalar.

    Returns:
        The loss.

    Raises:
        TypeError: With what it returned, or if there is none.
    """
    if loss_fn is None:
        raise TypeError(
            "loss_fn is missing; expected a function (params, batch) -> scalar, since "
            "this method estimates curvature from gradients"
        )
    example = next(regroup(samples, 1))
    with called_with("loss_fn", example), explained():
        found = jax.eval_shape(loss_fn, params, example)
    if (
        not hasattr(found, "shape")
        or found.shape != ()
        or not jnp.issubdtype(found.dtype, jnp.floating)
    ):
        raise TypeError(
            "loss_fn must return a scalar, the mean loss over the batch, and no state "
            f"or metrics beside it; for a batch of one example it returned {found}"
        )
    return loss_fn


@contextlib.contextmanager
def as_inputs() -> Iterator[None]:
    """Lets messages about samples name the argument ``inputs``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = re.sub(r"^samples\b", "inputs", str(error))
        raise OptionError("inputs", message) from error


@contextlib.contextmanager
def taken_by_net(inputs: Any, *, batches: bool, called: Any = None) -> Iterator[None]:
    """An error of net_fn says what it was given; of a list or tuple, how it was read.

    Args:
        inputs: As given.
        batches: Whether a list is one of batches; a tuple is one batch.
        called: Shapes that net_fn is called with, by an option ``batch_size``; default
            the inputs.

    Raises:
        OptionError: Caused by the error of net_fn; that itself, if it is explained.
    """
    remark = "" if called is None else _of_part(inputs, called)
    if not isinstance(inputs, (list, tuple)):
        with called_with("net_fn", inputs if called is None else called, remark):
            yield
        return
    try:
        yield
    except Exception as error:
        if expected_of("net_fn", error):
            with called_with("net_fn", inputs if called is None else called):
                raise
        first = inputs[0]
        of = f"an array of shape {first.shape}" if hasattr(first, "shape") else ""
        read, ways = "one batch", "np.concatenate(inputs) if they are batches"
        if isinstance(inputs, list):
            ways = "inputs[0] if they are batches"
            if batches:
                read, ways = "batches", "tuple(inputs) if they are one batch"
        raise OptionError(
            "inputs",
            f"inputs is a {type(inputs).__name__} of {len(inputs)}, the first "
            f"{of or 'a ' + type(first).__name__}, read as {read}, which net_fn does "
            f"not take ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
            "expected examples along the first axis of each array of a batch: give "
            f"{ways}, np.stack(inputs) if they are single examples{remark}",
        ) from error


def _of_part(inputs: Any, called: Any) -> str:
    """What to say of a call with some of the inputs."""
    number, total = batch_length(called), num_examples(inputs)
    vector = getattr(inputs, "ndim", 0) == 1
    single = "; give inputs[None] if they are a single example" if vector else ""
    if number == total:
        return single
    return (
        f"{single}; it is called with {number} of the {total} examples at once, by "
        f"batch_size: give batch_size={total} if it takes just so many"
    )


def counted_inputs(inputs: Any) -> int:
    """The number of examples of the inputs of a network.

    Raises:
        OptionError: If there are none, they cannot be counted, or a list of vectors may
            be one of examples or of batches of numbers.
    """
    if isinstance(inputs, list) and inputs and all(map(_is_float_vector, inputs)):
        raise OptionError(
            "inputs",
            f"inputs is a list of {len(inputs)} vectors, the first of shape "
            f"{inputs[0].shape}, which may be examples or batches of single numbers; "
            "give np.stack(inputs) if they are examples, np.concatenate(inputs) if "
            "they are batches",
        )
    with as_inputs():
        number = num_examples(inputs)
    if isinstance(inputs, Iterator):
        raise OptionError(
            "inputs",
            f"inputs is a {type(inputs).__name__}, which can be read only once; "
            "expected one batch (array, tuple or dict of arrays) or a list of batches, "
            "such as list(inputs)",
        )
    if not number:
        single = [
            leaf_name("inputs", path)
            for path, leaf in leaves_by_path(inputs).items()
            if not np.shape(leaf)
        ]
        where = (
            f"{single[0]} has no axis of examples in" if single else "no examples in"
        )
        raise OptionError(
            "inputs",
            f"{where} inputs={types_and_shapes(inputs)}; expected one batch (array, "
            "tuple or dict of arrays with one or more examples) or a list of batches",
        )
    return number


def check_not_zero(inputs: Any) -> None:
    """Raises if the inputs of a network are zeros; as tokens they mean something.

    Args:
        inputs: Any pytree of arrays.

    Raises:
        OptionError: Naming ``inputs``.
    """
    leaves = jax.tree.leaves(inputs)
    floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    if floating and not any(map(np.any, leaves)):
        raise OptionError(
            "inputs",
            "inputs are all zero, which does not tell what the weights are for; "
            "expected examples of what the network is used on",
        )


def _is_float_vector(array: Any) -> bool:
    dtype = getattr(array, "dtype", np.dtype(int))
    return getattr(array, "ndim", 0) == 1 and jnp.issubdtype(dtype, jnp.floating)


def check_size(name: str, what: str, values: Any, least: float = 0.0) -> None:
    """Raises for outputs or targets whose squares leave float32.

    Args:
        name: Of the argument.
        what: Its values as the start of a sentence, such as "targets are".
        values: Any array.
        least: That the largest of them must be, unless all are zero; default 0.

    Raises:
        OptionError: Naming the largest.
    """
    largest = float(np.max(np.abs(np.asarray(values)), initial=0))
    if not (largest == 0 or least <= largest <= LARGEST):
        bounds = f"between {least:g} and" if least else "at most"
        raise OptionError(
            name,
            f"{what} {largest:.3g} at most; expected {bounds} {LARGEST:g}, since their "
            "squares have to stay in float32: divide them by a constant, such as the "
            "largest",
        )


def check_targets(targets: Any, num_samples: int) -> np.ndarray:
    """Targets as an array, [N] or [].

    Raises:
        ValueError: If there is neither one finite number nor one for each gradient, or
            their squares leave float32.
    """
    found = np.asarray(targets, np.float32)
    shapes = ((num_samples,), ())
    if found.shape not in shapes or not np.isfinite(found).all():
        raise ValueError(
            f"targets has shape {found.shape}, num_samples={num_samples}; expected one "
            "finite number for each gradient, or one for all"
        )
    check_size("targets", "targets are", found)
    return found


def check_mean_samples(samples: Any, mesh: Mesh | None) -> Any:
    """Samples for the mean gradient, in a form that can be read more than once.

    Raises:
        ValueError: If there are none, or another number in another process.
    """

    def count() -> tuple[Any, int]:
        return counted(samples, None, 1)

    try:
        return counted_alike(count, mesh, "samples")[0]
    except ValueError as error:
        raise ValueError(f"mean_samples: {error}") from error


def counted_alike(
    count: Callable[[], tuple[Any, int]], mesh: Mesh | None, what: str
) -> tuple[Any, int]:
    """Samples and their number, after all processes of a mesh have counted alike.

    Otherwise some wait for gradients that others do not form, until JAX ends them.

    Args:
        count: Returns samples and their number.
        mesh: The devices of the step.
        what: The argument that was counted, for the message.

    Raises:
        ValueError: In all processes if the numbers differ, and where counting failed
            elsewhere. Where it failed, its own exception.
    """
    if not spans_processes(mesh):
        return count()
    try:
        found = count()
    except Exception:
        gathered(-1)  # the others wait for a number
        raise
    numbers = gathered(found[1])
    if (numbers != numbers[0]).any():
        parts = ", ".join(
            f"{number} in process {i}" if number >= 0 else f"none in process {i}"
            for i, number in enumerate(numbers)
        )
        raise ValueError(
            f"{what}: expected the same samples in every process; found gradients for "
            f"{parts}. Give every process all of them; prune spreads them itself"
        )
    return found


def counted(samples: Any, num_samples: int | None, batch_size: int) -> tuple[Any, int]:
    """Samples that can be read more than once, and N.

    Args:
        samples: As for :func:`woodfisher_jax.prune`.
        num_samples: N, or None for as many as there are.
        batch_size: m.

    Raises:
        ValueError: If there are none, or too few.
    """
    if samples is None:
        raise ValueError(
            "samples is missing; expected a batch or an iterable of batches, since "
            "this method estimates curvature from gradients"
        )
    total = num_examples(samples)
    if total is None:
        # A generator can be read only once, and the loss is checked on an example
        # before the gradients start; so what is needed is kept.
        needed = None if num_samples is None else num_samples * batch_size
        taken: list[Any] = []
        total = 0
        for batch in regroup(samples, min(needed or 1024, 1024)):
            taken.append(batch)
            total += batch_length(batch)
            if needed is not None and total >= needed:
                break
        samples = Examples(total, lambda: iter(taken))
    count = total // batch_size if num_samples is None else int(num_samples)
    if count < 1 or count * batch_size > total:
        raise ValueError(
            f"samples hold {total} examples, but num_samples={num_samples} gradients "
            f"of batch_size={batch_size} need {max(count, 1) * batch_size}; give more "
            "examples or lower one of the two"
        )
    return samples, count
