"""F⁻¹ of all blocks, for gradients in one array or in a store of any size.

:class:`InverseFisher` sweeps over tiles of blocks and applies one formula to each. It
takes them from a :class:`~woodfisher_jax.curvature.sources.Source`, in memory or in a
store, whose tiles are checked for precision. Both apply the same functions to the same
blocks.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.curvature import checked, programs
from woodfisher_jax.curvature.checked import Block, Task
from woodfisher_jax.curvature.groups import parts_of
from woodfisher_jax.curvature.method import Found
from woodfisher_jax.curvature.programs import Grams
from woodfisher_jax.curvature.sources import Blocks, InMemory, Source
from woodfisher_jax.equations.damping import (
    ChosenDamping,
    LeaveOneOut,
    choose_damping,
    leave_one_out,
)
from woodfisher_jax.rows.sharding import replicate
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.trees import blocks

FEW = 0.25
"""Share of the columns of a block up to which those of a support are gathered. With a
quarter (N = 1,000, c = 32,360) the joint update takes half the time; with a half it
takes as long as with zeros in their place."""

WORTH_GATHERING = 10**10
"""Least N² c, over the blocks of a tile, for gathering: half a second a call. Another
length of a support takes one to two seconds to compile."""


@dataclasses.dataclass(frozen=True)
class InverseFisher:
    """F⁻¹ of all blocks, as an operator on flat vectors.

    Attributes:
        source: Of the gradients.
        damping: λ > 0.
        centered: Whether F is the covariance of the rows, F - ḡḡᵀ.
        known: Factors of the blocks by tile, where they are known [num_blocks, N, N].
        grams: G Gᵀ of the blocks that ``known`` is of, in the same form.
    """

    source: Source
    damping: float | jax.Array
    centered: bool = False
    known: Grams | None = None
    grams: Grams | None = None

    # ------------------------------------------------------------ formulas of F⁻¹

    def diagonal(self) -> Found:
        """diag(F⁻¹) [d]; zero for weights in no block.

        Raises:
            CurvatureError: If the Fisher of a checked block is too ill conditioned.
        """
        task = checked.diagonal if self.source.keep_factors else checked.diagonal_alone
        value, errors, factors = self._zeros(), [], {}
        touched = self._zeros().astype(bool)
        for tile in self._sweep("curvature blocks"):
            found = self._run(task, tile, self._known(tile))
            value = self._put(value, found.value, tile)
            touched = self._put(touched, programs.touched(tile.gradients), tile)
            errors.append(found.error)
            factors[tile.key] = found.factor
        return Found(value, self._largest(errors), factors, touched)

    def product(
        self,
        vector: jax.Array,
        factors: Mapping[int, jax.Array | None] | None = None,
        *,
        rounded: bool = False,
    ) -> Found:
        """F⁻¹v for a flat vector v [d].

        Args:
            vector: v.
            factors: Of :meth:`diagonal`; default formed again.
            rounded: Whether the rounding of v to float32 counts as an error, as that of
                a mean; default v is what it is.

        Raises:
            CurvatureError: If the Fisher of a checked block is too ill conditioned.
        """
        task = checked.product_of_rounded if rounded else checked.product
        value, errors = self._zeros(), []
        # The tiles that were read last are still in the page cache.
        for tile in self._sweep("update blocks", reverse=True):
            v, factor = self._take(vector, tile), (factors or {}).get(tile.key)
            given = (v,) if factor is None else (v, factor)
            found = self._run(task, tile, given)
            value = self._put(value, found.value, tile)
            errors.append(found.error)
        return Found(value, self._largest(errors))

    def newton_step(
        self,
        targets: jax.Array,
        factors: Mapping[int, jax.Array | None] | None = None,
    ) -> Found:
        """``h = F⁻¹ḡ`` of the slope ``ḡ = -Gᵀy / N`` [d].

        Not a product with ḡ: its rounding leaves the span of the gradients, and F⁻¹
        divides that by λ. Centered gradients do not span ḡ, and a product will do.

        Args:
            targets: y, [N]; -1 for the mean gradient.
            factors: Of :meth:`diagonal`; default formed again.

        Raises:
            CurvatureError: If the Fisher of a checked block is too ill conditioned.
        """
        if self.centered:
            return self.product(self.slope(targets), factors, rounded=True)
        value, errors = self._zeros(), []
        for tile in self._sweep("slope blocks", reverse=True):
            number, factor = len(tile.gradients), (factors or {}).get(tile.key)
            everywhere = jnp.broadcast_to(targets, (number, *targets.shape))
            given = (everywhere,) if factor is None else (everywhere, factor)
            found = self._run(checked.newton, tile, given)
            value = self._put(value, found.value, tile)
            errors.append(found.error)
        return Found(value, self._largest(errors))

    def joint_update(
        self, weights: jax.Array, kept: jax.Array, targets: jax.Array
    ) -> Found:
        """How the kept weights move when all others are removed at once [d].

        Args:
            weights: w, [d].
            kept: What stays, [d].
            targets: y, [N]; see :func:`woodfisher_jax.equations.joint.joint_update`.

        Raises:
            CurvatureError: If the Fisher of a checked block is too ill conditioned.
        """
        value, errors = self._zeros(), []
        for tile in self._sweep("update blocks", reverse=True):
            number = len(tile.gradients)
            everywhere = jnp.broadcast_to(targets, (number, *targets.shape))
            w, factor = self._take(weights, tile), self._known(tile)
            columns = None if factor else self._few(tile, kept)
            given: tuple[Any, ...]
            if columns is None:
                given = (w, self._take(kept, tile), everywhere, *factor)
                found = self._run(checked.joint, tile, given)
            else:
                given = (w, columns, everywhere, self._factor_of_few(tile, columns))
                found = self._run(checked.joint_of_few, tile, given)
            value = self._put(value, found.value, tile)
            errors.append(found.error)
        return Found(value, self._largest(errors))

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """ρ of groups, summed over the blocks that they lie in [groups, choices].

        Args:
            weights: w, [d]; in methods of first order w - h.
            groups: Of a pattern; for N:M the choices are its ``removals``, else one.

        Raises:
            CurvatureError: If the Fisher of a block is too ill conditioned.
        """
        mesh, removals = self.source.compute.mesh, groups.removals
        choices = 1 if removals is None else len(removals)
        total = jnp.zeros((groups.number, choices), jnp.float32)
        total = replicate(total, mesh)
        for tile in self._sweep("blocks of groups"):
            parts = parts_of(np.asarray(tile.index), groups)
            tables = tuple(part.columns for part in parts)
            given = (self._take(weights, tile), *tables)
            task = checked.whole_groups
            if removals is not None:
                shape = (len(tile.gradients), *removals.shape)
                given = (given[0], np.broadcast_to(removals, shape), *tables)
                task = checked.chosen_of_each
            found = self._run(task, tile, given)
            numbers = np.concatenate([part.groups for part in parts], 1)
            total = programs.added(total, found.value, numbers, mesh)
        return total

    # ------------------------------------------------------- formulas of F and of G

    def multiplied(self, vector: jax.Array) -> jax.Array:
        """F v, the damped Fisher itself, for a flat vector v [d]."""
        value = self._zeros()
        for tile in self._sweep("swap blocks"):
            found = programs.multiplied(
                tile.gradients, self._take(vector, tile), self.damping
            )
            value = self._put(value, found, tile)
        return value

    def leverages(self, kept: jax.Array) -> jax.Array:
        """``h_k = g_kᵀ (N λ I + G_S G_Sᵀ)⁻¹ g_k`` of every weight, by blocks [d].

        Args:
            kept: S as True, [d].

        Raises:
            CurvatureError: If the Fisher of a checked block is too ill conditioned.
        """
        value = self._zeros()
        for tile in self._sweep("swap blocks"):
            columns = self._few(tile, kept)
            given: tuple[Any, ...] = (self._take(kept, tile),)
            if columns is not None:
                given = (*given, self._factor_of_few(tile, columns))
            found = self._run(checked.leverages, tile, given)
            value = self._put(value, found.value, tile)
        return value

    def quadratic_form(self, vector: jax.Array) -> float:
        """``vᵀ F v = Σ_B λ ‖v_B‖² + (1/N) Σ_n (g_nB · v_B)²`` over the blocks B.

        Args:
            vector: v, [d]; zero for weights in no block.
        """
        total = 0.0
        for tile in self._sweep("loss model blocks"):
            vectors = self._take(vector, tile)
            total += float(programs.forms(tile.gradients, vectors, self.damping))
        return total

    def slope(self, targets: jax.Array) -> jax.Array:
        """``ḡ = -Gᵀy / N``, the slope down which the rows change by y [d].

        Args:
            targets: y, [N]; -1 for the mean gradient.
        """
        value = self._zeros()
        for tile in self.source.sweep("slope blocks", reverse=True):
            value = self._put(value, programs.slopes(tile.gradients, targets), tile)
        return value

    # ------------------------------------------------------------ the damping chosen

    def with_chosen_damping(
        self,
        support: jax.Array,
        missing: jax.Array | np.ndarray,
        targets: jax.Array,
        least: float = 0.0,
    ) -> tuple["InverseFisher", ChosenDamping]:
        """The same with the damping of leave-one-out, one for all blocks.

        Args:
            support: As for :meth:`leave_one_out`.
            missing: As there.
            targets: As there.
            least: Of its multiples; default 0.

        Raises:
            ValueError: As :func:`woodfisher_jax.equations.damping.choose_damping`.
        """
        grams, found = self.leave_one_out(support, missing, targets)
        chosen = choose_damping(found, self.source.num_samples, least)
        fisher = dataclasses.replace(self, grams=grams)
        return fisher.with_damping(chosen.damping), chosen

    def leave_one_out(
        self,
        support: jax.Array,
        missing: jax.Array | np.ndarray,
        targets: jax.Array,
    ) -> tuple[Grams | None, LeaveOneOut]:
        """What a damping for all blocks together is chosen by.

        ``b = G v + y`` is to be predicted;
        see :func:`woodfisher_jax.equations.damping.leave_one_out`.

        Args:
            support: Weights of which the others predict one row [d], bool.
            missing: v, [d].
            targets: y, [N].

        Returns:
            ``grams`` over the support, where they are few and serve; and the errors.
        """
        number, blocks_, grams = self.source.num_samples, 0, {}
        total, right = jnp.zeros((number, number)), targets
        in_memory = isinstance(self.source, InMemory) and self.source.keep_factors
        for tile in self._sweep("damping blocks", reverse=True):
            columns = self._few(tile, support)
            kept = self._take(support, tile) if columns is None else None
            total, right, found = programs.grams_and_missing(
                tile.gradients,
                kept,
                columns,
                self._take(missing, tile),
                total,
                right,
            )
            blocks_ += len(found)
            # Beside gradients in memory there is room for those of all blocks.
            if self._by_samples(tile) and (in_memory or blocks_ == 1):
                grams[tile.key] = found
        serve = in_memory or (blocks_ == 1 and self.source.compute.mesh is None)
        return grams if serve and grams else None, leave_one_out(total, right)

    def factored(self) -> "InverseFisher":
        """The same with the factors of all blocks, formed in one loop for all tiles."""
        if self.known is not None or not self.source.keep_factors:
            return self
        grams = {
            tile.key: programs.grams(tile.gradients)
            for tile in self._sweep("curvature blocks")
            if self._by_samples(tile)
        }
        found = dataclasses.replace(self, grams=grams or None)
        return found.with_damping(self.damping)

    def with_damping(self, damping: float | jax.Array) -> "InverseFisher":
        """The same with another λ."""
        known = None
        if self.grams is not None:
            # A factor takes N³ operations from here; from the gradients N²c.
            known = programs.factors(self.grams, damping)
        return dataclasses.replace(self, damping=damping, known=known)

    # --------------------------------------------- between tiles and flat vectors

    def _sweep(self, label: str, reverse: bool = False) -> Iterator[Blocks]:
        for tile in self.source.sweep(label, reverse):
            if self.centered:
                tile = tile._replace(gradients=programs.centered(tile.gradients))
            yield tile

    def _by_samples(self, tile: Blocks) -> bool:
        """Whether the factor of a block is that of its Gram matrix."""
        _, number, width = tile.gradients.shape
        return self.source.compute.solver_for(number, width) == "sample_space"

    def _known(self, tile: Blocks) -> tuple[jax.Array, ...]:
        known = None if self.known is None else self.known.get(tile.key)
        return () if known is None else (known,)

    def _few(self, tile: Blocks, support: jax.Array) -> np.ndarray | None:
        """Columns of a support that are so few that they are worth gathering."""
        blocks_, number, width = tile.gradients.shape
        if not (self.source.is_checked and self._by_samples(tile)):
            return None
        if blocks_ * number**2 * width < WORTH_GATHERING:
            return None
        columns = blocks.columns_of(np.asarray(support), np.asarray(tile.index))
        return columns if columns.shape[1] <= width * FEW else None

    def _factor_of_few(self, tile: Blocks, columns: np.ndarray) -> jax.Array:
        factor = self._run(checked.factor_of_few, tile, (columns,)).factor
        assert factor is not None
        return factor

    def _run(self, task: Task, tile: Blocks, others: tuple[Any, ...]) -> Block:
        """A task for the blocks of a tile."""
        source, (_, number, width) = self.source, tile.gradients.shape
        solver = source.compute.solver_for(number, width)
        if not source.is_checked:
            found = checked.run_blocks(
                task,
                tile.gradients,
                jax.lax.optimization_barrier(others),
                jnp.asarray(self.damping),
                solver,
            )
            return jax.lax.optimization_barrier(found)
        found = checked.checked_blocks(
            task,
            tile.gradients,
            others,
            float(self.damping),
            solver,
            tile.names,
            mesh=source.compute.mesh,
        )
        return found._replace(error=jnp.zeros(()))

    def _largest(self, errors: list[jax.Array]) -> jax.Array | float:
        if self.source.is_checked:
            return 0.0
        every = jnp.concatenate([jnp.ravel(error) for error in errors])
        # A NaN in any block has to show: the maximum on a CPU leaves it out.
        return jnp.max(jnp.where(jnp.isnan(every), jnp.inf, every))

    def _zeros(self) -> jax.Array:
        zeros = jnp.zeros(self.source.size, jnp.float32)
        return replicate(zeros, self.source.compute.mesh)

    def _put(self, vector: jax.Array, values: jax.Array, tile: Blocks) -> jax.Array:
        return programs.put(vector, values, tile.index, self.source.compute.mesh)

    def _take(self, vector: jax.Array | np.ndarray, tile: Blocks) -> jax.Array:
        return programs.take(vector, tile.index, self.source.compute.mesh)
