"""Layer-wise pruning: the outputs of one layer stay near what they were.

For a layer with inputs x and weights W [outputs, inputs] the new weights P minimise

    E ‖P x - W z‖² + λ' ‖P - W‖²

with as many zeros as asked for, where z are the inputs of the unpruned network and x
those of the network pruned so far (z = x in most of the literature). With

    A = E[x xᵀ] + λ' I,    B = W (E[z xᵀ] + λ' I)

that is ``tr(P A Pᵀ) - 2 tr(P Bᵀ)`` and a constant. Given which weights are zero it is
least squares for each output; which are zero is found by the alternating direction
method of multipliers (ADMM).

Frantar & Alistarh 2023 (SparseGPT, arXiv:2301.00774) pose the problem; Boža 2024
(arXiv:2401.02938) and Meng et al. 2024 (ALPS, arXiv:2406.07831) use ADMM.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from woodfisher_jax.equations.precision import matmul
from woodfisher_jax.equations.thresholds import keep_about, keep_highest


@jax.jit
def layer_error(weights: jax.Array, pruned: jax.Array, moment: jax.Array) -> jax.Array:
    """Relative error of a layer's outputs, ``tr(D A Dᵀ) / tr(W A Wᵀ)``, D = W - P.

    Args:
        weights: W, [groups, outputs, inputs].
        pruned: P, of the same shape.
        moment: A = E[x xᵀ], [groups, inputs, inputs].

    Returns:
        A scalar; 0 for a layer whose outputs are all zero.
    """

    def energy(matrix: jax.Array) -> jax.Array:
        return jnp.sum(matmul(matrix, moment) * matrix)

    whole = energy(weights)
    return energy(weights - pruned) / jnp.where(whole > 0, whole, 1.0)


def keep_of_each(scores: jax.Array, kept: int, size: int) -> jax.Array:
    """Marks the ``kept`` highest of each ``size`` consecutive scores of the last axis.

    Args:
        scores: Any shape; its last axis is a multiple of ``size``.
        kept: N.
        size: M.
    """
    parts = scores.reshape(*scores.shape[:-1], -1, size)
    mine, other = parts[..., :, None], parts[..., None, :]
    before = jnp.arange(size)[None, :] < jnp.arange(size)[:, None]
    ahead = jnp.sum((other > mine) | ((other == mine) & before), axis=-1)
    return (ahead < kept).reshape(scores.shape)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """X Y at full precision, by itself.

    Fused with what follows, it takes a compiler for TPUs more than twice as long.
    """
    return jax.lax.optimization_barrier(matmul(left, right))


def least_squares_on(
    support: jax.Array,
    start: jax.Array,
    moment: jax.Array,
    wanted: jax.Array,
    steps: int,
) -> jax.Array:
    """Lowers ``tr(P A Pᵀ) - 2 tr(P Bᵀ)`` over the weights of a support.

    Conjugate gradients for all outputs at once, each with its own step length,
    preconditioned by the diagonal of A. An output whose residual is zero stays.

    Args:
        support: Which weights may differ from zero, bool [groups, outputs, inputs].
        start: P, zero outside of the support, of the same shape.
        moment: A, [groups, inputs, inputs], positive definite.
        wanted: B, [groups, outputs, inputs].
        steps: Number of steps; 0 returns ``start``.
    """
    diagonal = jnp.diagonal(moment, axis1=1, axis2=2)[:, None, :]
    residual = (wanted - _product(start, moment)) * support
    scaled = residual / diagonal

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def step(_: int, state: State) -> State:
        found, residual, direction, size = state
        image = _product(direction, moment)
        length = ratio(size, dot(direction, image))
        found = found + length * direction
        residual = residual - length * image * support
        scaled = residual / diagonal
        new = dot(residual, scaled)
        return found, residual, scaled + ratio(new, size) * direction, new

    state = (start, residual, scaled, dot(residual, scaled))
    return jax.lax.fori_loop(0, steps, step, state)[0]


BLOCK = 128
"""Rows and columns that :func:`inverse_by_blocks` takes at a time."""


def inverse_of(matrices: jax.Array) -> jax.Array:
    """Inverses of symmetric positive definite matrices [groups, n, n], float32.

    By Cholesky; on a TPU by :func:`inverse_by_blocks`, since XLA writes out Cholesky
    and triangular solves there as a program that grows with n.
    """
    return jax.lax.platform_dependent(
        matrices, tpu=jax.vmap(inverse_by_blocks), default=_inverse_by_cholesky
    )


def _inverse_by_cholesky(matrices: jax.Array) -> jax.Array:
    lower = jnp.linalg.cholesky(matrices)
    identity = jnp.eye(lower.shape[-1], dtype=lower.dtype)
    half = jax.scipy.linalg.solve_triangular(
        lower, jnp.broadcast_to(identity, lower.shape), lower=True
    )
    return matmul(jnp.swapaxes(half, 1, 2), half)


def inverse_by_blocks(matrix: jax.Array) -> jax.Array:
    """The inverse of a symmetric positive definite matrix by Gauss and Jordan.

    For each diagonal block k in turn, with D = A_kk⁻¹ and i, j all other blocks:

        A_ij ← A_ij - A_ik D A_kj,   A_kj ← D A_kj,   A_ik ← -A_ik D,   A_kk ← D

    Args:
        matrix: A, [n, n], float32.

    Returns:
        A⁻¹, [n, n].
    """
    size = matrix.shape[0]
    padded = -(-size // BLOCK) * BLOCK
    identity = jnp.eye(padded, dtype=matrix.dtype)
    start = identity.at[:size, :size].set(matrix)

    def step(k: jax.Array, found: jax.Array) -> jax.Array:
        first = k * BLOCK
        own = jnp.arange(padded) // BLOCK == k
        rows = jax.lax.dynamic_slice_in_dim(found, first, BLOCK, axis=0)
        columns = jax.lax.dynamic_slice_in_dim(found, first, BLOCK, axis=1)
        block = jax.lax.dynamic_slice_in_dim(rows, first, BLOCK, axis=1)
        inverse = _inverse_by_cholesky(block[None])[0]
        # With zeros at the block itself, whose place the last two lines fill.
        scaled = matmul(inverse, jnp.where(own, 0.0, rows))
        columns = jnp.where(own[:, None], 0.0, columns)
        found = jnp.where(own | own[:, None], 0.0, found) - matmul(columns, scaled)
        columns = -matmul(columns, inverse)
        columns = jax.lax.dynamic_update_slice_in_dim(columns, inverse, first, axis=0)
        found = jax.lax.dynamic_update_slice_in_dim(found, scaled, first, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(found, columns, first, axis=1)

    found = jax.lax.fori_loop(0, padded // BLOCK, step, start)
    return found[:size, :size]


Keep = Callable[[jax.Array], jax.Array]
"""From scores [groups, outputs, inputs] to which weights stay."""


def split_weights(
    weights: jax.Array,
    moment: jax.Array,
    wanted: jax.Array,
    keep: Keep,
    about: Keep,
    penalties: jax.Array,
    rounds: int,
) -> tuple[jax.Array, jax.Array]:
    """Which weights of a layer stay, by ADMM.

    Minimises over P and a sparse Z with P = Z; U are the multipliers:

        Z = the best of P + U / ρ,   U ← U + ρ (P - Z),
        P = (B + ρ Z - U) (A + ρ I)⁻¹

    Args:
        weights: Where P starts, [groups, outputs, inputs].
        moment: A, [groups, inputs, inputs], with a diagonal near 1.
        wanted: B, of the shape of ``weights``.
        keep: The choice of weights by their size.
        about: The same, or nearly: for all rounds but the last.
        penalties: ρ, a rising sequence [stages].
        rounds: Rounds with each of them.

    Returns:
        Z, sparse, and which of its weights stay, of the shape of ``weights``.
    """
    identity = jnp.eye(moment.shape[-1], dtype=moment.dtype)

    def stage(
        state: tuple[jax.Array, jax.Array], penalty: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        inverse = inverse_of(moment + penalty * identity)

        def one(
            _: int, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            found, multipliers = state
            target = found + multipliers / penalty
            sparse = jnp.where(about(jnp.abs(target)), target, 0.0)
            multipliers = multipliers + penalty * (found - sparse)
            found = _product(wanted + penalty * sparse - multipliers, inverse)
            return found, multipliers

        return jax.lax.fori_loop(0, rounds, one, state), None

    (found, multipliers), _ = jax.lax.scan(
        stage, (weights, jnp.zeros_like(weights)), penalties
    )
    target = found + multipliers / penalties[-1]
    mask = keep(jnp.abs(target))
    return jnp.where(mask, target, 0.0), mask


@partial(jax.jit, static_argnames=("pattern", "rounds", "polish"))
def pruned_layer(
    weights: jax.Array,
    moment: jax.Array,
    cross: jax.Array,
    importance: jax.Array,
    allowed: jax.Array,
    kept: jax.Array,
    damping: jax.Array,
    penalties: jax.Array,
    *,
    pattern: tuple[int, int] | None = None,
    rounds: int,
    polish: int,
) -> tuple[jax.Array, jax.Array]:
    """Prunes one layer so that its outputs stay near what they were.

    The inputs are scaled to unit second moment, ADMM chooses the weights
    (:func:`split_weights`), and conjugate gradients fit them
    (:func:`least_squares_on`).

    Args:
        weights: W, [groups, outputs, inputs].
        moment: E[x xᵀ], [groups, inputs, inputs].
        cross: E[z xᵀ], of the same shape; equal to ``moment`` for z = x.
        importance: How much an error of each output counts, [groups, outputs]: rows of
            the error are multiplied by it before they are squared.
        allowed: Which weights may stay, bool, of the shape of ``weights``.
        kept: How many stay; without a pattern.
        damping: λ' relative to the mean of A's diagonal.
        penalties: ρ of ADMM, rising; in units of A's diagonal.
        pattern: (N, M): N of each M consecutive inputs stay; default none.
        rounds: Rounds of ADMM with each ρ.
        polish: Steps of conjugate gradients.

    Returns:
        New weights and their mask.
    """
    identity = jnp.eye(moment.shape[-1], dtype=moment.dtype)
    diagonal = jnp.diagonal(moment, axis1=1, axis2=2)
    mean = jnp.mean(diagonal, axis=1)[:, None, None]
    # Of inputs that are all zero nothing is known: their weights go first.
    ridge = damping * jnp.where(mean > 0, mean, 1.0) * identity
    damped = moment + ridge
    scale = jnp.sqrt(jnp.diagonal(damped, axis1=1, axis2=2))[:, None, :]
    scaled_moment = damped / scale / jnp.swapaxes(scale, 1, 2)
    rows = importance[:, :, None]
    wanted = rows * matmul(weights, cross + ridge) / scale

    def keep(scores: jax.Array, choose: Callable[..., jax.Array]) -> jax.Array:
        if pattern is None:
            flat = choose(scores.reshape(-1), allowed.reshape(-1), kept)
            return flat.reshape(scores.shape)
        ranked = jnp.where(allowed, scores, -1.0)
        return keep_of_each(ranked, *pattern) & allowed

    sparse, mask = split_weights(
        rows * weights * scale,
        scaled_moment,
        wanted,
        partial(keep, choose=keep_highest),
        partial(keep, choose=keep_about),
        penalties,
        rounds,
    )
    fitted = least_squares_on(mask, sparse, scaled_moment, wanted, polish)
    return fitted / scale / rows, mask
