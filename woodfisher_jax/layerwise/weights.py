"""Single weights and N:M groups that layer-wise pruning takes from a layer."""

import jax
import numpy as np

from woodfisher_jax.equations.layerwise import layer_error, pruned_layer
from woodfisher_jax.layerwise.budgets import importance_of, scores_of, shared_out
from woodfisher_jax.layerwise.layers import Layer
from woodfisher_jax.layerwise.sequence import Layers, Sequence
from woodfisher_jax.options import OptionError
from woodfisher_jax.selection.named_patterns import Pattern
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.trees.masks import Masks, count, most_sparse, num_kept

PENALTIES = (0.4, 0.7)
"""Penalties of ADMM in turn, in units of the second moment of an input."""


class SingleWeights:
    """A share of the weights goes.

    Attributes:
        rule: N:M, or None for single weights.
        level: That share, of all layers together.
        sparser: Names of layers of which masks left fewer weights than were to stay.
    """

    def __init__(self, rule: Pattern | None, level: float) -> None:
        self.rule, self.level = rule, level
        self.sparser: list[str] = []
        self._kept: dict[tuple[Product, int], int] = {}

    def chosen(self, layers: Layers) -> Layers:
        """All layers.

        Raises:
            OptionError: If the sparsity leaves no weight in any of them.
        """
        every = [layer for own in layers.values() for layer in own]
        largest = max(every, key=lambda layer: layer.size)
        if not num_kept(largest.size, self.level):
            expected = f"at most {most_sparse(largest.size)}, which leaves one"
            if largest.size == 1:
                expected = "sparsity=0, or a layer of more weights"
            raise OptionError(
                "sparsity",
                f"sparsity={self.level} leaves none of the {largest.size} weights of "
                f"{largest.product.path!r}, the largest layer; expected {expected}",
            )
        return layers

    def check_left(self, layers: Layers, masks: Masks, scope: str) -> None:
        """Raises if masks leave fewer weights than the level, as in ``wf.prune``.

        Args:
            layers: That are pruned.
            masks: Of their tensors.
            scope: "global", or "layer": fewer in every layer.

        Raises:
            OptionError: With the sparsity that there is.
        """
        left, size = count(masks)
        if left >= num_kept(size, self.level):
            return
        if scope == "layer":
            flat = {path: np.asarray(mask).reshape(-1) for path, mask in masks.items()}
            for product, own in layers.items():
                for layer in own:
                    stays = int(flat[product.path][layer.entries()].sum())
                    if stays >= num_kept(layer.size, self.level):
                        return
        raise OptionError(
            "sparsity",
            f"sparsity={self.level} is below the {1 - left / size:.6g} that masks have "
            "already; a pruned weight does not come back",
        )

    def allocate(self, sequence: Sequence) -> None:
        """Decides how many weights of each layer stay."""
        every = [
            (p, layer) for p, layers in sequence.layers.items() for layer in layers
        ]
        counts = [num_kept(layer.size, self.level) for _, layer in every]
        settings = sequence.settings
        if settings.scope == "global" and self.rule is None:
            sequence.look()
            scores = [
                scores_of(sequence.original[p.path], layer, sequence.found[p])
                for p, layer in every
            ]
            counts = shared_out(scores, self.level, settings.spread)
        self._kept = {
            (product, layer.number): count
            for (product, layer), count in zip(every, counts, strict=True)
        }

    def prune(
        self,
        sequence: Sequence,
        product: Product,
        moment: jax.Array,
        cross: jax.Array,
    ) -> None:
        """Prunes the layers of a product, and writes their weights and masks."""
        path, settings = product.path, sequence.settings
        leaf = np.array(sequence.leaves[path])
        mask = sequence.masks[path].reshape(-1)
        for layer in sequence.layers[product]:
            own, other = (_part(matrix, layer) for matrix in (moment, cross))
            entries = layer.entries()
            weights = leaf.reshape(-1)[entries].astype(np.float32)
            allowed = mask[entries]
            kept, left = self._kept[product, layer.number], int(allowed.sum())
            if left < kept:
                stacked = layer.size < leaf.size
                self.sparser.append(f"{path}[{layer.number}]" if stacked else path)
                kept = left
            found = sequence.found.get(product)
            importance = np.ones(weights.shape[:2], np.float32)
            if found is not None:
                importance = importance_of(np.asarray(found.outputs)[layer.groups])
            pruned, stays = pruned_layer(
                weights,
                own,
                other,
                importance,
                allowed,
                kept,
                np.float32(settings.damping),
                np.asarray(PENALTIES, np.float32),
                pattern=None if self.rule is None else (self.rule.kept, self.rule.size),
                rounds=settings.rounds,
                polish=settings.polish,
            )
            error = layer_error(weights, pruned, own)
            leaf.reshape(-1)[entries] = np.asarray(pruned).astype(leaf.dtype)
            mask[entries] = np.asarray(stays)
            left = int(stays.sum()) / stays.size
            sequence.done(path, layer.number, 1 - left, error)
        sequence.leaves[path] = leaf


def _part(moment: jax.Array, layer: Layer) -> jax.Array:
    """The second moments of a layer's groups, in the order of its columns."""
    whole = len(layer.groups) == len(moment)
    if whole and (np.diff(layer.columns) == 1).all():
        return moment
    return moment[np.ix_(layer.groups, layer.columns, layer.columns)]
