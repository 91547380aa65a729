"""Per-sample gradients, mini-batch means, and labels for the true Fisher.

The model enters as ``loss_fn(params, batch) -> scalar``, the mean loss over the batch
with batch statistics frozen. A loss that depends on more arrays than its parameters
(running statistics, say) is passed as ``jax.tree_util.Partial(loss, arrays)``, so that
new values of them do not compile anew.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial

from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.rows.sharding import (
    AXIS,
    num_devices,
    on_each_device,
    placed,
    platform_of,
    replicate,
    shard_rows,
)
from woodfisher_jax.rows.targets import compiled
from woodfisher_jax.trees.blocks import FlatOrder, flat_order, flatten
from woodfisher_jax.trees.masks import Masks, MasksLike, paired
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import Batch, batch_length, regroup, shape_of
from woodfisher_jax.trees.vectors import all_finite

LossFn = Callable[[Params, Batch], jax.Array]
Gradients = dict[str, jax.Array]


def as_partial(loss_fn: Callable[..., Any]) -> Partial:
    """Makes the loss an argument that jit caches on; a Partial passes unchanged."""
    return loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)


def masked_gradient(
    loss_fn: LossFn, params: Params, masks: Masks, batch: Batch
) -> tuple[jax.Array, Gradients]:
    """Loss and its gradient with respect to the weights that the masks keep.

    ``g = M ⊙ ∇_w (1/m) Σ_j loss(w, x_j)`` over the m examples of the batch.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree.
        masks: From path to bool; other parameters are constants.
        batch: m examples.

    Returns:
        The loss (scalar) and, in float32, the gradient of each masked parameter.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.mean(x @ params["w"])
        >>> params, masks = {"w": jnp.ones(2)}, {"w": jnp.array([True, False])}
        >>> x = jnp.ones((3, 2))
        >>> loss, g = wf.gradients.masked_gradient(loss_fn, params, masks, x)
        >>> float(loss), g["w"].tolist()
        (2.0, [1.0, 0.0])
    """
    leaves = leaves_by_path(params)
    weights = {path: leaves[path] for path in masks}

    def loss(weights: Gradients) -> jax.Array:
        return loss_fn(replace_leaves(params, weights), batch)

    value, gradients = jax.value_and_grad(loss)(weights)
    return value, {
        path: jnp.where(masks[path], g.astype(jnp.float32), 0.0)
        for path, g in gradients.items()
    }


def gradient_rows(
    loss_fn: LossFn,
    params: Params,
    masks: MasksLike,
    batch: Batch,
    order: FlatOrder | None = None,
) -> jax.Array:
    """G: one row for each example of a batch, its gradient as a flat vector.

    Pure, so that it can be part of a program of the caller's: with
    :func:`woodfisher_jax.step` it is a pruning step inside ``jit``, or under ``vmap``
    over networks, seeds and sparsities.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree; pruned weights should be zero.
        masks: From path to bool, or a pytree of the structure of ``params``: the
            prunable parameters, and which weights are left.
        batch: N examples, a pytree of arrays with a leading axis.
        order: How the tensors follow one another; default as in ``params``, which is
            the order of :func:`woodfisher_jax.prune`.

    Returns:
        Array [N, d], float32; zero for pruned weights.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.mean(x @ params["w"])
        >>> masks = {"w": jnp.array([True, False])}
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> wf.gradient_rows(loss_fn, {"w": jnp.ones(2)}, masks, x).tolist()
        [[1.0, 0.0], [3.0, 0.0]]
    """
    masks = paired(params, masks)
    if order is None:
        # Not the dict's own order, for jit sorts dicts.
        order = flat_order({p: masks[p] for p in leaves_by_path(params) if p in masks})
    alone = jax.tree.map(lambda a: a[:, None], batch)
    return _rows(as_partial(loss_fn), params, masks, alone, order)[1]


def _rows(
    loss_fn: Partial, params: Params, masks: Masks, groups: Batch, order: FlatOrder
) -> tuple[jax.Array, jax.Array]:
    """Losses [n] and rows [n, d] of n groups; leaves of ``groups`` are [n, m, ...]."""
    gradient = jax.vmap(masked_gradient, in_axes=(None, None, None, 0))
    losses, gradients = gradient(loss_fn, params, masks, groups)
    return losses, flatten(order, gradients)


class _Chunk(NamedTuple):
    """Rows of some groups of examples.

    Attributes:
        losses: [n].
        rows: [n, d].
        finite: Whether all entries of a tensor are, [tensors].
    """

    losses: jax.Array
    rows: jax.Array
    finite: jax.Array


@partial(jax.jit, static_argnames=("order", "mesh"))
def _chunk(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    groups: Batch,
    order: FlatOrder,
    mesh: Mesh | None,
) -> _Chunk:
    samples, everywhere = PartitionSpec(AXIS), PartitionSpec()
    losses, rows = on_each_device(
        partial(_rows, order=order),
        mesh,
        (everywhere, everywhere, everywhere, samples),
        samples,
    )(loss_fn, params, masks, groups)
    return _Chunk(losses, rows, _all_finite(rows, order))


def _all_finite(rows: jax.Array, order: FlatOrder) -> jax.Array:
    bounds = pairwise(order.offsets)
    parts = [all_finite(rows[:, start:stop]) for start, stop in bounds]
    return jnp.stack(parts)


def _accumulated(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    groups: Batch,
    parts: int,
    order: FlatOrder,
    mesh: Mesh | None,
) -> _Chunk:
    """The same for groups too large for one pass: weighted sums over their parts."""
    length = jax.tree.leaves(groups)[0].shape[1]
    bounds = [length * i // parts for i in range(parts + 1)]
    total: tuple[jax.Array, jax.Array] | None = None
    for start, stop in pairwise(bounds):
        part = jax.tree.map(lambda a, i=start, j=stop: a[:, i:j], groups)
        share = (stop - start) / length
        found = _chunk(loss_fn, params, masks, shard_rows(part, mesh), order, mesh)
        term = found.losses * share, found.rows * share
        total = term if total is None else jax.tree.map(jnp.add, total, term)
    assert total is not None
    return _Chunk(*total, _all_finite(total[1], order))


def row_chunks(
    problem: Problem, microbatch_size: int, order: FlatOrder | None = None
) -> Iterator[jax.Array]:
    """Rows of all N gradients, in chunks, with progress.

    Args:
        problem: The loss, its parameters and samples.
        microbatch_size: Most examples whose gradients a device forms at once; it bounds
            memory and does not change the result beyond rounding.
        order: Of some of the problem's tensors, to which the rows are confined; default
            all.

    Yields:
        Arrays [n, order.size], float32, of at most microbatch_size / m rows a device,
        or one.

    Raises:
        ValueError: If there are too few examples, or a loss or a gradient is not
            finite; the message names the examples and the parameter.
    """
    order = order or problem.order
    mesh, m, number = problem.compute.mesh, problem.batch_size, problem.num_samples
    masks = {path: problem.masks[path] for path in order.paths}
    loss, params, masks = replicate((problem.loss_fn, problem.params, masks), mesh)
    devices = num_devices(mesh)
    groups = devices * chunk_length(number, m, microbatch_size, devices)
    parts = -(-m // microbatch_size)
    # An accelerator is given the next chunk before the last one is checked.
    ahead = 0 if platform_of(mesh) == "cpu" else 1
    unchecked: deque[_Flags] = deque()
    done = 0
    problem.compute.report("gradients", 0, number)
    for grouped, wanted in grouped_chunks(problem, groups):
        if parts > 1:
            found = _accumulated(loss, params, masks, grouped, parts, order, mesh)
        else:
            spread = shard_rows(grouped, mesh)
            found = _chunk(loss, params, masks, spread, order, mesh)
        unchecked.append(_Flags(found.losses, found.finite, wanted, done * m))
        while len(unchecked) > ahead:
            _check_finite(unchecked.popleft(), problem, order)
        done += wanted
        yield found.rows[:wanted] if wanted < groups else found.rows
        problem.compute.report("gradients", done, number)
    while unchecked:
        _check_finite(unchecked.popleft(), problem, order)
    if done < number:
        raise ValueError(
            f"samples hold {done * m} usable examples, but num_samples={number} "
            f"gradients of batch_size={m} need {number * m}; give more examples or "
            "lower one of the two"
        )


def grouped_chunks(problem: Problem, groups: int) -> Iterator[tuple[Batch, int]]:
    """The examples of N rows, in chunks of so many groups of m.

    A short last chunk is filled up by repetition, to compile only once.

    Yields:
        A chunk, leaves [groups, m, ...], and how many of its groups are wanted.
    """
    m, left = problem.batch_size, problem.num_samples
    for batch in regroup(problem.samples, groups * m):
        wanted = min(batch_length(batch) // m, left)
        if wanted == 0:
            return
        index = np.arange(groups * m) % (wanted * m)
        yield (
            jax.tree.map(
                lambda a, index=index: a[index].reshape(groups, m, *np.shape(a)[1:]),
                batch,
            ),
            wanted,
        )
        left -= wanted
        if left == 0:
            return


def chunk_length(
    num_samples: int, batch_size: int, microbatch_size: int, devices: int = 1
) -> int:
    """How many gradients a device forms at once.

    Chunks are of one length, as far as possible, so that one compilation serves all.

    Args:
        num_samples: N.
        batch_size: m, examples a gradient.
        microbatch_size: Most examples at once.
        devices: Devices that share the samples.
    """
    each = -(-num_samples // devices)
    most = max(1, min(microbatch_size // batch_size, each))
    return -(-each // -(-each // most))


class Program(NamedTuple):
    """The compiled rows of one chunk.

    Attributes:
        temporary_bytes: Memory of one device for what is neither argument nor result.
        flops: Floating-point operations for a chunk, over all devices; nan where the
            compiler does not say.
    """

    temporary_bytes: int
    flops: float


_PROGRAMS: WeakKeyDictionary[Any, Program] = WeakKeyDictionary()
"""What is known of programs that were compiled, by their jaxpr."""


def compile_rows(problem: Problem, microbatch_size: int) -> Program:
    """Compiles what :func:`row_chunks` then uses, and says what it takes.

    Args:
        problem: The loss, its parameters (shapes will do) and samples.
        microbatch_size: Most examples whose gradients a device forms at once.
    """
    traced = trace_rows(problem, microbatch_size)
    # The same object for the same loss and shapes, as long as JAX keeps the program.
    found = _PROGRAMS.get(traced.jaxpr.jaxpr)
    if found is None:
        lowered = traced.lower()
        made = compiled(lowered, problem.compute.mesh)
        # Of a device that is not there only the compiler counts, for one device.
        each = (made.cost_analysis() or {}).get("flops", math.nan)
        total = num_devices(problem.compute.mesh) * each
        flops = (lowered.cost_analysis() or {}).get("flops", total)
        memory = made.memory_analysis()
        found = Program(memory.temp_size_in_bytes if memory else 0, flops)
        _PROGRAMS[traced.jaxpr.jaxpr] = found
    parts = -(-problem.batch_size // microbatch_size)
    return found._replace(flops=found.flops * parts)


def trace_rows(problem: Problem, microbatch_size: int) -> Any:
    """The gradients of one chunk as a program to compile; arguments as above."""
    mesh, m = problem.compute.mesh, problem.batch_size
    devices = num_devices(mesh)
    groups = devices * chunk_length(problem.num_samples, m, microbatch_size, devices)
    parts = -(-m // microbatch_size)
    batch = jax.tree.map(
        lambda a: shape_of(
            a, (groups, -(-m // parts), *np.shape(a)[1:]), placed(mesh, AXIS)
        ),
        next(regroup(problem.samples, 1)),
    )
    return _chunk.trace(
        problem.loss_fn, problem.params, problem.masks, batch, problem.order, mesh
    )


class _Flags(NamedTuple):
    """What is known of a chunk before anybody has waited for it."""

    losses: jax.Array
    finite: jax.Array
    wanted: int
    first_example: int


def _check_finite(flags: _Flags, problem: Problem, order: FlatOrder) -> None:
    mesh, m = problem.compute.mesh, problem.batch_size
    losses, first = replicate(flags.losses, mesh), flags.first_example
    losses = np.asarray(losses)[: flags.wanted]
    finite = np.isfinite(losses)
    if not finite.all():
        example = first + int(np.argmin(finite)) * m
        raise ValueError(
            f"loss_fn returned {float(losses[np.argmin(finite)])} at example {example} "
            f"of samples (batch of {m}); it must be finite at the given params"
        )
    sound = np.asarray(replicate(flags.finite, mesh))
    if not sound.all():
        path = order.paths[int(np.argmin(sound))]
        raise ValueError(
            f"the gradient of {path!r} is not finite for some of the examples {first} "
            f"to {first + len(losses) * m - 1} of samples, though their loss is; look "
            "for a square root or a division at zero in loss_fn"
        )


def sample_labels(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws labels from the model's own predictions, for the true Fisher.

    ``y ~ softmax(z)``; gradients at these labels have the Fisher, not the empirical
    Fisher, as second moment (WoodFisher, arXiv:2004.14340, Section 3.1).

    Args:
        key: A JAX random key.
        logits: z, [..., classes].

    Returns:
        int32 labels [...].

    Example:
        >>> logits = jnp.array([[-100.0, 100.0], [100.0, -100.0]])
        >>> wf.gradients.sample_labels(jax.random.key(0), logits).tolist()
        [1, 0]
    """
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
