"""Formulas of one tile of blocks, as programs: arrays in, arrays out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax.equations.batched import map_blocks
from woodfisher_jax.equations.factors import shifted_factor
from woodfisher_jax.equations.fisher import fisher_product
from woodfisher_jax.equations.joint import columns_at
from woodfisher_jax.equations.precision import in_float64, matmul, wide
from woodfisher_jax.equations.products import along_rows, gram_matrix
from woodfisher_jax.rows.budget import BATCH_BYTES
from woodfisher_jax.rows.sharding import AXIS, held
from woodfisher_jax.trees import blocks

Grams = dict[int, jax.Array]
"""Of tiles by their key: N x N matrices of the blocks, float64 [num_blocks, N, N]."""


@jax.jit
def centered(gradients: jax.Array) -> jax.Array:
    """G - 1ḡᵀ of each block, so that GᵀG / N is F - ḡḡᵀ."""
    wide = gradients.astype(jnp.float32)
    return wide - jnp.mean(wide, axis=1, keepdims=True)


@jax.jit
def touched(gradients: jax.Array) -> jax.Array:
    """Weights of each block with a gradient whose square float32 tells from zero."""
    wide = gradients.astype(jnp.float32)
    return jnp.any(wide * wide > 0, axis=1)


@jax.jit
def forms(gradients: jax.Array, vectors: jax.Array, damping: float) -> jax.Array:
    """Σ_B v_Bᵀ F_B v_B over the blocks of a tile."""
    along = matmul(gradients.astype(jnp.float32), vectors[..., None])
    squares = jnp.sum(along * along) / gradients.shape[1]
    return squares + damping * jnp.sum(vectors * vectors)


@jax.jit
def multiplied(gradients: jax.Array, vectors: jax.Array, damping: float) -> jax.Array:
    """F_B v_B of each block of a tile."""
    wide = gradients.astype(jnp.float32)
    strength = jnp.asarray(damping)
    return jax.vmap(fisher_product, (0, None, 0))(wide, strength, vectors)


@jax.jit
def slopes(gradients: jax.Array, targets: jax.Array) -> jax.Array:
    """-Gᵀy / N of each block of a tile."""
    # A sum, whose order does not depend on the number of blocks as that of a product
    # does: F⁻¹ would enlarge the difference.
    terms = targets[:, None] * gradients.astype(jnp.float32)
    return -jnp.sum(terms, axis=1) / gradients.shape[1]


@jax.jit
@in_float64
def grams(gradients: jax.Array) -> jax.Array:
    """G Gᵀ of each block of a tile, float64."""
    return jax.lax.map(gram_matrix, gradients)


@jax.jit
@in_float64
def factors(grams: Grams, damping: jax.Array) -> Grams:
    """The factors of all blocks, of all tiles in one loop, which is compiled once."""
    every = jnp.concatenate(list(grams.values()))
    shift = every.shape[1] * wide(damping)
    together = max(1, BATCH_BYTES // (4 * every[0].size * every.dtype.itemsize))
    found = map_blocks(lambda gram: shifted_factor(gram, shift), every, together)
    ends = np.cumsum([len(gram) for gram in grams.values()])
    return dict(zip(grams, jnp.split(found, ends[:-1]), strict=True))


@jax.jit
@in_float64
def grams_and_missing(
    gradients: jax.Array,
    support: jax.Array | None,
    columns: jax.Array | None,
    missing: jax.Array,
    total: jax.Array,
    right: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds Σ_B G_S G_Sᵀ and Σ_B G v over the blocks of a tile; and G_S G_Sᵀ of each.

    S is given as True or by its columns.
    """

    def one_block(
        block: tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        rows, kept, few, vector = block
        products = along_rows(rows, wide(vector))
        staying = rows if few is None else columns_at(rows, few)
        if kept is not None:
            staying = jnp.where(kept, staying, 0.0)
        return gram_matrix(staying), products

    grams, products = jax.lax.map(one_block, (gradients, support, columns, missing))
    total, right = total + jnp.sum(grams, axis=0), right + jnp.sum(products, axis=0)
    return total, right, grams


@partial(jax.jit, static_argnames="mesh", donate_argnames="total")
def added(
    total: jax.Array, values: jax.Array, index: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """Adds what is known of some groups [blocks, groups * choices] to their rows."""
    rows = held(values, mesh).reshape(-1, total.shape[1])
    return total.at[index.reshape(-1)].add(rows, mode="drop")


@partial(jax.jit, static_argnames="mesh", donate_argnames="vector")
def put(
    vector: jax.Array, values: jax.Array, index: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """The flat vector with the values of a tile's blocks, which every device holds."""
    return blocks.scatter(vector, index, held(values, mesh))


@partial(jax.jit, static_argnames="mesh")
def take(
    vector: jax.Array | np.ndarray, index: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """What a flat vector has in a tile's blocks, each on the device of its block."""
    return held(blocks.gather(jnp.asarray(vector), index), mesh, AXIS)
