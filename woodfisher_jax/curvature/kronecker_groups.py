"""The joint statistic of groups where a layer's F⁻¹ is a Kronecker product."""

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature.groups import parts_of
from woodfisher_jax.equations.kronecker import Factor, Factors
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees.blocks import FlatOrder, unflatten

TOGETHER = 2**22
"""Numbers of the matrices that are solved together."""


def kronecker_saliencies(
    inverses: Factors, weights: jax.Array, order: FlatOrder, groups: Groups
) -> np.ndarray:
    """ρ of groups with ``F⁻¹ = S⁻¹ ⊗ A⁻¹`` of each layer, in float64.

    ``ρ_Q = w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q / 2`` where [F⁻¹]_QQ has ``S⁻¹_oo' A⁻¹_ii'`` for
    weights from inputs i, i' to outputs o, o'. A group of several layers is worth the
    sum of its parts. Time goes with the cube of a part's size.

    Args:
        inverses: From :func:`~woodfisher_jax.equations.kronecker.inverse`.
        weights: w, [d].
        order: The flat order.
        groups: Of the whole vector.

    Returns:
        Array [groups, choices]; the choices are the ``removals`` of N:M, else one.
    """
    values = np.append(np.asarray(weights, np.float64), 0.0)
    choices = 1 if groups.removals is None else len(groups.removals)
    # One more, which padding belongs to.
    total = np.zeros((groups.number + 1, choices))
    for factor in inverses.values():
        places = _places(factor, order)
        for number, index in enumerate(places):
            flat = np.append(index, order.size)
            for part in parts_of(index.reshape(1, -1), groups):
                size = part.columns.shape[2]
                together = max(1, TOGETHER // (size * size * choices))
                for start in range(0, part.columns.shape[1], together):
                    some = slice(start, start + together)
                    columns = part.columns[0, some]
                    forms = _forms(
                        _submatrices(factor, number, columns, index.shape[1]),
                        values[flat[columns]],
                        groups.removals,
                    )
                    np.add.at(total, part.groups[0, some], forms / 2)
    return total[:-1]


def _places(factor: Factor, order: FlatOrder) -> np.ndarray:
    """Where the layer's weights stand in the flat vector [groups, outputs, columns]."""
    own = unflatten(order, jnp.arange(order.size))
    found = [
        np.asarray(own[path]).reshape(-1)[entries]
        for path, entries in factor.entries.items()
    ]
    return np.concatenate(found, axis=-1)


def _submatrices(
    factor: Factor, number: int, columns: np.ndarray, width: int
) -> np.ndarray:
    """[F⁻¹]_QQ of some groups [n, q, q]; the identity for padding.

    Args:
        factor: Inverses of the layer.
        number: Of the layer's group of channels.
        columns: Places in its matrix, row by row [n, q]; its size is padding.
        width: Columns of the matrix.
    """
    inputs, outputs = factor.inputs[number], factor.outputs[number]
    real = columns < len(outputs) * width
    output, column = np.divmod(np.where(real, columns, 0), width)
    found = outputs[output[:, :, None], output[:, None, :]]
    found = found * inputs[column[:, :, None], column[:, None, :]]
    both = real[:, :, None] & real[:, None, :]
    return np.where(both, found, np.eye(columns.shape[1]))


def _forms(
    matrices: np.ndarray, vectors: np.ndarray, removals: np.ndarray | None
) -> np.ndarray:
    """``vᵀ A⁻¹ v`` of each matrix, or of its parts that go together [n, choices]."""
    if removals is None:
        matrices, vectors = matrices[:, None], vectors[:, None]
    else:
        matrices = matrices[:, removals[:, :, None], removals[:, None, :]]
        vectors = vectors[:, removals]
    solved = np.linalg.solve(matrices, vectors[..., None])[..., 0]
    return np.sum(vectors * solved, axis=-1)
