"""Curvature of a network's outputs, without labels, from gradients of projections.

The gradient of the loss at its labels vanishes where a network fits its data, and the
empirical Fisher with it. The Gauss-Newton matrix of the outputs does not:

    E[(∂z/∂w)ᵀ M (∂z/∂w)] = E[g gᵀ],    g = ∇_w (r · z(w, x)),    E[r rᵀ] = M

so one gradient an example of a random projection of the outputs z estimates it, and
serves every method in place of the gradient of the loss. With M = I it is the curvature
of the squared distance of the outputs from what they are now, with M = diag(p) - p pᵀ
that of the cross entropy from what it is now, which is the Fisher.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

METRICS = ("identity", "softmax")
"""Names of the matrices M."""


def directions(key: jax.Array, outputs: jax.Array, metric: str) -> jax.Array:
    """Random directions r with the second moment M of a metric.

    With ξ of independent random signs: ``r = ξ`` for "identity"; for "softmax"
    ``r = √p ⊙ ξ - p (√p · ξ)``, whose second moment is ``diag(p) - p pᵀ``, the Hessian
    of the cross entropy in the logits (Martens, arXiv:1412.1193, Section 6).

    Args:
        key: A JAX random key.
        outputs: z, [n, k]: logits, of which "identity" takes only the shape.
        metric: One of METRICS.

    Returns:
        float32 [n, k].

    Raises:
        ValueError: If there is no such metric.

    Example:
        >>> key, outputs = jax.random.key(0), jnp.zeros((4, 3))
        >>> r = wf.projections.directions(key, outputs, "identity")
        >>> r.shape, abs(r).max().item(), abs(r).min().item()
        ((4, 3), 1.0, 1.0)
        >>> r = wf.projections.directions(key, outputs, "softmax")
        >>> bool(jnp.allclose(r.sum(axis=-1), 0, atol=1e-6))
        True
    """
    signs = jax.random.rademacher(key, outputs.shape, jnp.float32)
    if metric == "identity":
        return signs
    if metric == "softmax":
        p = jax.nn.softmax(outputs.astype(jnp.float32))
        rooted = jnp.sqrt(p) * signs
        return rooted - p * jnp.sum(rooted, axis=-1, keepdims=True)
    raise ValueError(f"metric={metric!r}; expected one of {list(METRICS)}")


def projected(outputs_fn: Callable[..., jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """A loss whose gradient is that of a projection of the outputs.

    ``(params, batch) -> (1/m) Σ_j r_j · z(w, x_j)`` with z of ``batch["inputs"]`` and r
    of ``batch["direction"]``: to be given to :func:`woodfisher_jax.prune` as
    ``loss_fn``, with ``batch_size=1``, since projections of several examples cancel.

    Args:
        outputs_fn: (params, inputs) -> outputs [m, k]. For the same one the same loss
            is returned, so that nothing is compiled anew. Outputs that depend on more
            arrays (batch-norm statistics) are ``jax.tree_util.Partial(f, arrays)``.

    As in::

        r = directions(key, net(params, images), "identity")
        wf.prune(projected(net), params, {"inputs": images, "direction": r}, ...)
    """
    if isinstance(outputs_fn, Partial):
        loss = _projected(outputs_fn.func)
        return Partial(loss, *outputs_fn.args, **outputs_fn.keywords)
    return _projected(outputs_fn)


@functools.lru_cache(maxsize=8)
def _projected(outputs_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def loss(*arguments: Any, **others: Any) -> jax.Array:
        *first, batch = arguments
        outputs = outputs_fn(*first, batch["inputs"], **others)
        along = jnp.sum(
            outputs * batch["direction"], axis=tuple(range(1, outputs.ndim))
        )
        return jnp.mean(along)

    return loss
