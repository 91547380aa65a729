"""Per-sample gradients, mini-batch means, and labels for the true Fisher.

The model enters as ``loss_fn(params, batch) -> scalar``, the mean loss over the batch
with batch statistics frozen. A loss that depends on more arrays than its parameters
(running statistics, say) is passed as ``jax.tree_util.Partial(loss, arrays)``, so that
new values of them do not compile anew.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from woodfisher_jax.pruning.masks import Masks
from woodfisher_jax.pruning.paths import Params, leaves_by_path, replace_leaves
from woodfisher_jax.pruning.samples import Batch, batch_length, regroup

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


@jax.jit
def _grouped_gradients(
    loss_fn: Partial, params: Params, masks: Masks, groups: Batch
) -> tuple[jax.Array, Gradients]:
    """``masked_gradient`` of each of n groups; leaves of ``groups`` are [n, m, ...]."""
    return jax.vmap(masked_gradient, in_axes=(None, None, None, 0))(
        loss_fn, params, masks, groups
    )


def _accumulated_gradient(
    loss_fn: Partial, params: Params, masks: Masks, batch: Batch, parts: int
) -> tuple[jax.Array, Gradients]:
    """The same for one group too large for one pass: a weighted sum over its parts."""
    length = batch_length(batch)
    bounds = [length * i // parts for i in range(parts + 1)]
    total: tuple[jax.Array, Gradients] | None = None
    for start, stop in pairwise(bounds):
        part = jax.tree.map(lambda a, i=start, j=stop: a[None, i:j], batch)
        share = (stop - start) / length
        term = jax.tree.map(
            lambda a, share=share: a * share,
            _grouped_gradients(loss_fn, params, masks, part),
        )
        total = term if total is None else jax.tree.map(jnp.add, total, term)
    assert total is not None
    return total


def gradient_chunks(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    samples: Any,
    *,
    num_samples: int,
    batch_size: int = 1,
    microbatch_size: int = 64,
) -> Iterator[Gradients]:
    """Gradients of ``num_samples`` groups of ``batch_size`` examples, in chunks.

    Args:
        loss_fn: (params, batch) -> mean loss.
        params: Any pytree; pruned weights should be zero.
        masks: From path to bool.
        samples: One batch, or an iterable of batches, read in order.
        num_samples: N, how many gradients.
        batch_size: m, how many examples each is the mean over.
        microbatch_size: Most examples whose gradients are formed at once; it bounds
            memory and does not change the result beyond rounding.

    Yields:
        From path to gradients [n, ...] in float32, n <= max(1, microbatch_size / m).

    Raises:
        ValueError: If there are too few examples, or a loss or a gradient is not
            finite; the message names the examples and the parameter.
    """
    loss_fn = as_partial(loss_fn)
    most = max(1, min(microbatch_size // batch_size, num_samples))
    # Chunks of one length, as far as possible, so that one compilation serves all.
    groups = -(-num_samples // -(-num_samples // most))
    parts = -(-batch_size // microbatch_size)
    done = 0
    for batch in regroup(samples, groups * batch_size):
        wanted = min(batch_length(batch) // batch_size, num_samples - done)
        if wanted == 0:
            break
        if parts > 1:
            losses, found = _accumulated_gradient(loss_fn, params, masks, batch, parts)
        else:
            # A short last chunk is filled up by repetition, to compile only once.
            rows = np.arange(groups * batch_size) % (wanted * batch_size)
            grouped = jax.tree.map(
                lambda a, rows=rows: a[rows].reshape(
                    groups, batch_size, *np.shape(a)[1:]
                ),
                batch,
            )
            losses, found = _grouped_gradients(loss_fn, params, masks, grouped)
        if wanted < groups:
            losses, found = losses[:wanted], {p: g[:wanted] for p, g in found.items()}
        _check_finite(losses, found, done * batch_size, batch_size)
        yield found
        done += wanted
        if done == num_samples:
            return
    raise ValueError(
        f"samples hold {done * batch_size} usable examples, but num_samples="
        f"{num_samples} gradients of batch_size={batch_size} need "
        f"{num_samples * batch_size}; give more examples or lower one of the two"
    )


def _check_finite(
    losses: jax.Array, gradients: Gradients, first: int, batch_size: int
) -> None:
    finite = np.isfinite(np.asarray(losses))
    if not finite.all():
        example = first + int(np.argmin(finite)) * batch_size
        raise ValueError(
            f"loss_fn returned {float(losses[np.argmin(finite)])} at example {example} "
            f"of samples (batch of {batch_size}); it must be finite at the given params"
        )
    for path, all_finite in _all_finite(gradients).items():
        if not all_finite:
            raise ValueError(
                f"the gradient of {path!r} is not finite for some of the examples "
                f"{first} to {first + len(finite) * batch_size - 1} of samples, though "
                "their loss is; look for a square root or a division at zero in loss_fn"
            )


@jax.jit
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
    """
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
