"""Structures taken from the layers that read them, and from those that make them."""

import jax
import numpy as np

from woodfisher_jax.equations.layerwise import layer_error
from woodfisher_jax.equations.removal import losses_in_turn, without_inputs
from woodfisher_jax.layerwise.sequence import Layers, Sequence
from woodfisher_jax.layerwise.settings import CostShare
from woodfisher_jax.layerwise.structures import Reader, counts_of
from woodfisher_jax.selection.accounts import Budget
from woodfisher_jax.selection.structures import Structures
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.trees.masks import Masks

STEPS = 64
"""In which a layer's structures go, some at once in each."""


class Removal:
    """Structures go that one layer alone reads.

    Attributes:
        found: These structures.
        readers: The layers by the path of their weights.
        level: The share of each family that goes.
        budget: What may be left in all; empty for that share.
        whole: Names of the families that stay.
    """

    def __init__(
        self,
        found: Structures,
        readers: dict[str, Reader],
        level: float,
        budget: Budget,
        whole: tuple[str, ...],
    ) -> None:
        self.whole = whole
        self.found, self.readers = found, readers
        self.level, self.budget = level, budget
        self._gone: dict[tuple[int, ...], int] = {}

    def chosen(self, layers: Layers) -> Layers:
        """The layers that read structures."""
        return {p: own for p, own in layers.items() if p.path in self.readers}

    def allocate(self, sequence: Sequence) -> None:
        """Decides how many structures each layer no longer reads."""
        losses = None
        if sequence.settings.scope == "global":
            sequence.look()
            losses = dict[int, float]()
            for product, moment in sequence.unpruned():
                losses |= self._losses(sequence, product, moment)
        spread = sequence.settings.spread
        counts = counts_of(self.found, self.level, self.budget, losses, spread)
        self._gone = dict(zip(self.found.units, counts, strict=True))

    def _losses(
        self, sequence: Sequence, product: Product, moment: jax.Array
    ) -> dict[int, float]:
        """What the structures that a layer reads are worth to the outputs.

        ``Σ_o E[g_o²] Δ_o``, Δ the squares by which the layer's outputs change when a
        structure goes in its turn, the others before it gone and made up for: what a
        layer's last structures are worth is more than what they are worth beside all.
        """
        (layer,), reader = sequence.layers[product], self.readers[product.path]
        leaf = np.asarray(sequence.original[reader.path])
        slopes = np.asarray(sequence.found[product].outputs)[layer.groups][0]
        weights = leaf.reshape(-1)[layer.entries()[0]].astype(np.float32)
        there = reader.there(sequence.masks[reader.path], layer)
        losses: dict[int, float] = {}
        for family, groups in reader.parts(layer):
            stays = there[groups[:, 0]]
            number = max(0, int(stays.sum()) - 1)
            found = losses_in_turn(
                weights * np.sqrt(slopes)[:, None],
                moment[0],
                there,
                groups,
                np.float32(sequence.settings.damping),
                number=number,
                together=-(-number // STEPS) or 1,
            )
            values = np.where(stays, np.asarray(found), 0.0).tolist()
            losses |= dict(zip(family.units, values, strict=True))
        return losses

    def costs(self, masks: Masks) -> dict[str, CostShare]:
        """What masks leave of each cost that has a budget."""
        all_of = self.found.account().left
        left = self.found.account(self.found.gone(masks)).left
        # The share as it was given, without the rounding of a product and a quotient.
        return {
            name: CostShare(round(most / all_of[name], 12), left[name] / all_of[name])
            for name, most in self.budget.items()
        }

    def prune(
        self,
        sequence: Sequence,
        product: Product,
        moment: jax.Array,
        cross: jax.Array,
    ) -> None:
        """Takes out of a layer what it reads, and of those that make it."""
        (layer,), reader = sequence.layers[product], self.readers[product.path]
        leaf = np.array(sequence.leaves[reader.path])
        (entries,) = layer.entries()
        weights = leaf.reshape(-1)[entries].astype(np.float32)
        left = reader.there(sequence.masks[reader.path], layer)
        for family, groups in reader.parts(layer):
            gone = int((~left[groups[:, 0]]).sum())
            number = max(0, self._gone[family.units] - gone)
            pruned, stays = without_inputs(
                weights,
                moment[0],
                cross[0],
                left,
                groups,
                np.float32(sequence.settings.damping),
                number=number,
                together=-(-number // STEPS) or 1,
            )
            left = np.asarray(stays)
            units = np.array(family.units)[~left[groups[:, 0]]]
            family.take_out(sequence.masks, set(units.tolist()))
        leaf.reshape(-1)[entries] = np.asarray(pruned).astype(leaf.dtype)
        sequence.leaves[reader.path] = leaf
        members = {m.path for family in reader.families for m in family.members}
        for path in members & sequence.masks.keys():
            leaf = np.array(sequence.leaves[path])
            leaf[~sequence.masks[path]] = 0
            sequence.leaves[path] = leaf
        error = layer_error(weights[None], pruned[None], moment)
        sequence.done(reader.path, layer.number, 1 - float(np.mean(left)), error)
