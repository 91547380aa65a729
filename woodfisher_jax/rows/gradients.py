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
    one_axis,
    placed,
    replicate,
    shard_rows,
)
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.trees.samples import Batch, batch_length, regroup

LossFn = Callable[[Params, Batch], jax.Array]
Gradients = dict[str, jax.Array]


def as_partial(loss_fn: LossFn) -> Partial:
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


@partial(jax.jit, static_argnames="mesh")
def _grouped_gradients(
    loss_fn: Partial, params: Params, masks: Masks, groups: Batch, mesh: Mesh | None
) -> tuple[jax.Array, Gradients, dict[str, jax.Array]]:
    """``masked_gradient`` of each of n groups; leaves of ``groups`` are [n, m, ...].

    Returns:
        Losses [n], gradients [n, ...], and whether all of a tensor's are finite.
    """
    samples, everywhere = PartitionSpec(AXIS), PartitionSpec()
    losses, gradients = on_each_device(
        jax.vmap(masked_gradient, in_axes=(None, None, None, 0)),
        mesh,
        (everywhere, everywhere, everywhere, samples),
        samples,
    )(loss_fn, params, masks, groups)
    return losses, gradients, _all_finite(gradients)


def _accumulated_gradients(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    groups: Batch,
    parts: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, Gradients, dict[str, jax.Array]]:
    """The same for groups too large for one pass: weighted sums over their parts."""
    length = jax.tree.leaves(groups)[0].shape[1]
    bounds = [length * i // parts for i in range(parts + 1)]
    total: tuple[jax.Array, Gradients] | None = None
    for start, stop in pairwise(bounds):
        part = jax.tree.map(lambda a, i=start, j=stop: a[:, i:j], groups)
        share = (stop - start) / length
        *found, _ = _grouped_gradients(
            loss_fn, params, masks, shard_rows(part, mesh), mesh
        )
        term = jax.tree.map(lambda a, share=share: a * share, tuple(found))
        total = term if total is None else jax.tree.map(jnp.add, total, term)
    assert total is not None
    return *total, _all_finite(total[1])


def gradient_chunks(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    *,
    num_samples: int,
    batch_size: int = 1,
    microbatch_size: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[Gradients]:
    """Gradients of ``num_samples`` groups of ``batch_size`` examples, in chunks.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree; pruned weights should be zero.
        masks: From path to bool.
        samples: One batch, or an iterable of batches, read in order.
        num_samples: N, how many gradients.
        batch_size: m, how many examples each is the mean over.
        microbatch_size: Most examples whose gradients a device forms at once; it bounds
            memory and does not change the result beyond rounding.
        mesh: Devices to spread the samples over; default one.

    Yields:
        From path to gradients [n, ...] in float32, of at most microbatch_size / m
        samples a device, or one.

    Raises:
        ValueError: If there are too few examples, or a loss or a gradient is not
            finite; the message names the examples and the parameter.
    """
    mesh = one_axis(mesh)
    loss, params, masks = replicate((as_partial(loss_fn), params, masks), mesh)
    devices = num_devices(mesh)
    groups = devices * chunk_length(num_samples, batch_size, microbatch_size, devices)
    parts = -(-batch_size // microbatch_size)
    # An accelerator is given the next chunk before the last one is looked at.
    ahead = 0 if jax.default_backend() == "cpu" else 1
    unchecked: deque[_Flags] = deque()
    done = 0
    for batch in regroup(samples, groups * batch_size):
        wanted = min(batch_length(batch) // batch_size, num_samples - done)
        if wanted == 0:
            break
        # A short last chunk is filled up by repetition, to compile only once.
        rows = np.arange(groups * batch_size) % (wanted * batch_size)
        grouped = jax.tree.map(
            lambda a, rows=rows: np.asarray(a)[rows].reshape(
                groups, batch_size, *np.shape(a)[1:]
            ),
            batch,
        )
        if parts > 1:
            losses, found, finite = _accumulated_gradients(
                loss, params, masks, grouped, parts, mesh
            )
        else:
            losses, found, finite = _grouped_gradients(
                loss, params, masks, shard_rows(grouped, mesh), mesh
            )
        unchecked.append(_Flags(losses, finite, wanted, done * batch_size))
        while len(unchecked) > ahead:
            _check_finite(unchecked.popleft(), batch_size, mesh)
        if wanted < groups:
            found = {path: g[:wanted] for path, g in found.items()}
        yield found
        done += wanted
        if done == num_samples:
            break
    while unchecked:
        _check_finite(unchecked.popleft(), batch_size, mesh)
    if done < num_samples:
        raise ValueError(
            f"samples hold {done * batch_size} usable examples, but num_samples="
            f"{num_samples} gradients of batch_size={batch_size} need "
            f"{num_samples * batch_size}; give more examples or lower one of the two"
        )


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
    """The compiled gradients of one chunk.

    Attributes:
        temporary_bytes: Memory of one device for what is neither argument nor result.
        flops: Floating-point operations for a chunk, over all devices; nan where the
            compiler does not say.
    """

    temporary_bytes: int
    flops: float


def compile_gradients(
    loss_fn: Partial,
    params: Params,
    masks: Masks,
    example: Batch,
    *,
    num_samples: int,
    batch_size: int,
    microbatch_size: int,
    mesh: Mesh | None = None,
) -> Program:
    """Compiles what :func:`gradient_chunks` then uses, and says what it takes.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree, of arrays or shapes.
        masks: From path to bool.
        example: A batch of one example, for its shapes.
        num_samples: N.
        batch_size: m.
        microbatch_size: Most examples whose gradients a device forms at once.
        mesh: Devices to spread the samples over; default one.
    """
    devices = num_devices(mesh)
    groups = devices * chunk_length(num_samples, batch_size, microbatch_size, devices)
    length = min(batch_size, -(-batch_size // -(-batch_size // microbatch_size)))
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (groups, length, *np.shape(a)[1:]),
            jax.dtypes.canonicalize_dtype(np.asarray(a).dtype),
            sharding=placed(mesh, AXIS),
        ),
        example,
    )
    lowered = _grouped_gradients.lower(loss_fn, params, masks, batch, mesh)
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    found = lowered.compile().memory_analysis()
    parts = -(-batch_size // microbatch_size)
    return Program(found.temp_size_in_bytes if found else 0, flops * parts)


def compile_rows(problem: Problem, microbatch_size: int) -> Program:
    """Compiles the gradients of one chunk of a problem, and says what it takes."""
    return compile_gradients(
        problem.loss_fn,
        problem.params,
        problem.masks,
        next(regroup(problem.samples, 1)),
        num_samples=problem.num_samples,
        batch_size=problem.batch_size,
        microbatch_size=microbatch_size,
        mesh=problem.compute.mesh,
    )


class _Flags(NamedTuple):
    """What is known of a chunk before anybody has waited for it."""

    losses: jax.Array
    finite: dict[str, jax.Array]
    wanted: int
    first_example: int


def _check_finite(flags: _Flags, batch_size: int, mesh: Mesh | None) -> None:
    losses, first = replicate(flags.losses, mesh), flags.first_example
    losses = np.asarray(losses)[: flags.wanted]
    finite = np.isfinite(losses)
    if not finite.all():
        example = first + int(np.argmin(finite)) * batch_size
        raise ValueError(
            f"loss_fn returned {float(losses[np.argmin(finite)])} at example {example} "
            f"of samples (batch of {batch_size}); it must be finite at the given params"
        )
    for path, all_finite in flags.finite.items():
        if not all_finite:
            raise ValueError(
                f"the gradient of {path!r} is not finite for some of the examples "
                f"{first} to {first + len(losses) * batch_size - 1} of samples, though "
                "their loss is; look for a square root or a division at zero in loss_fn"
            )


def _all_finite(gradients: Gradients) -> dict[str, jax.Array]:
    return {path: jnp.all(jnp.isfinite(g)) for path, g in gradients.items()}


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
