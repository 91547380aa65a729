"""The inverse Fisher of all blocks: its diagonal and its products, panel by panel.

Gradients are formed once and stored, or formed again for every use, a part of the
blocks at a time. Either way they pass through the devices panel by panel.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax.curvature import checked as curvature
from woodfisher_jax.curvature.groups import group_saliencies, parts_of
from woodfisher_jax.curvature.joint import joint_updates
from woodfisher_jax.equations.damping import ChosenDamping, choose_damping
from woodfisher_jax.equations.fisher import (
    choose_solver,
    fisher_product,
    gram_matrix,
    matmul,
    shifted_factor,
)
from woodfisher_jax.rows.disk import locked_folder
from woodfisher_jax.rows.gradients import Gradients
from woodfisher_jax.rows.memory_plan import Storage
from woodfisher_jax.rows.sharding import AXIS, held, replicate
from woodfisher_jax.rows.store import Store, collect, new_store
from woodfisher_jax.rows.tiles import Panel, Part, block_names
from woodfisher_jax.selection.patterns import Groups
from woodfisher_jax.settings import Settings
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.blocks import FlatOrder


class InverseFisher:
    """F⁻¹ of all blocks, as an operator on flat vectors.

    Attributes:
        seconds_gradients: Wall time of forming and storing gradients so far.
    """

    def __init__(
        self,
        gradients: Callable[[FlatOrder], Iterator[Gradients]],
        storage: Storage,
        settings: Settings,
    ):
        """Lays the work out; nothing is computed yet.

        Args:
            gradients: Forms those of some tensors, for all samples, in chunks.
            storage: How the blocks are laid out and where their gradients wait.
            settings: Damping, solver, devices and so on.
        """
        self._gradients = gradients
        self._storage = storage
        self._settings = settings
        self._damping = settings.damping
        self._factors: dict[int, jax.Array | None] = {}
        self._chosen: jax.Array | None = None
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._store: Store | None = None
        self._step = 1
        self.seconds_gradients = 0.0

    def __enter__(self) -> "InverseFisher":
        """Forms the gradients, if they are to be stored."""
        place, parts = self._storage.store, self._storage.parts
        with self._stack:
            if place == "disk":
                folder = locked_folder(self._settings.store_dir)
                self._folder = self._stack.enter_context(folder)
            if place != "recompute":
                (part,) = parts
                self._store = self._collected(part)
            # Nothing has failed: what is to be undone waits for the end.
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives the store's room back."""
        if self._store is not None:
            self._store.close()
        self._store = None
        self._factors = {}
        self._stack.close()

    def diagonal(self) -> jax.Array:
        """diag(F⁻¹) as one flat vector [d]; zero for weights in no block.

        Raises:
            CurvatureError: If a block is not accurate even in float64.
        """
        settings = self._settings
        vector = self._zeros()
        for part, panel, gradients in self._panels("curvature blocks"):
            found, factors = curvature.inverse_diagonals(
                gradients,
                self._strength(),
                self._solver(panel),
                block_names(part, panel),
                mesh=settings.mesh,
                keep=self._storage.keep_factors,
                factors=self._chosen,
            )
            self._factors[part.first + panel.start] = factors
            vector = self._put(vector, found, part, panel)
        return vector

    def product(self, vector: jax.Array) -> jax.Array:
        """F⁻¹v for a flat vector v [d].

        Raises:
            CurvatureError: If a block is not accurate even in float64.
        """
        settings = self._settings
        result = self._zeros()
        for part, panel, gradients in self._panels("update blocks"):
            found = curvature.inverse_products(
                gradients,
                self._strength(),
                self._take(vector, part, panel),
                self._solver(panel),
                block_names(part, panel),
                mesh=settings.mesh,
                factors=self._factors.get(part.first + panel.start),
            )
            result = self._put(result, found, part, panel)
        return result

    def joint_update(
        self, weights: jax.Array, kept: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """How the kept weights move when all others go at once [d].

        Args:
            weights: w, [d].
            kept: What stays, [d].
            targets: y, [N]; see :func:`woodfisher_jax.curvature.joint.joint_update`.

        Raises:
            CurvatureError: If a block is not accurate even in float64.
        """
        result = self._zeros()
        for part, panel, gradients in self._panels("update blocks"):
            found = joint_updates(
                gradients,
                self._take(weights, part, panel),
                self._take(kept, part, panel),
                targets,
                self._strength(),
                self._solver(panel),
                block_names(part, panel),
                mesh=self._settings.mesh,
                factors=self._chosen,
            )
            result = self._put(result, found, part, panel)
        return result

    def group_saliency(self, weights: jax.Array, groups: Groups) -> jax.Array:
        """ρ of groups, summed over the blocks that they lie in [groups, choices].

        Args:
            weights: w, [d]; in methods of first order w - h.
            groups: Of a pattern; for N:M the choices are its ``removals``, else one.

        Raises:
            CurvatureError: If a block is not accurate even in float64.
        """
        settings, removals = self._settings, groups.removals
        choices = 1 if removals is None else len(removals)
        total = jnp.zeros((groups.number, choices), jnp.float32)
        total = replicate(total, settings.mesh)
        for part, panel, gradients in self._panels("blocks of groups"):
            parts = parts_of(self._index(part, panel), groups)
            found = group_saliencies(
                gradients,
                self._take(weights, part, panel),
                parts,
                removals,
                self._strength(),
                self._solver(panel),
                block_names(part, panel),
                mesh=settings.mesh,
            )
            numbers = [p.groups for p in parts]
            total = _added(total, found, np.concatenate(numbers, 1), settings.mesh)
        return total

    def multiplied(self, vector: jax.Array) -> jax.Array:
        """F v, the damped Fisher itself, for a flat vector v [d]."""
        result = self._zeros()
        for part, panel, gradients in self._panels("swap blocks"):
            vectors = self._take(vector, part, panel)
            found = _multiplied(gradients, vectors, self._strength())
            result = self._put(result, found, part, panel)
        return result

    def leverages(self, kept: jax.Array) -> jax.Array:
        """``h_k = g_kᵀ (N λ I + G_S G_Sᵀ)⁻¹ g_k`` of every weight, by blocks [d].

        Args:
            kept: S as True, [d].
        """
        result = self._zeros()
        for part, panel, gradients in self._panels("swap blocks"):
            support = self._take(kept, part, panel)
            found = _leverages(gradients, support, self._strength())
            result = self._put(result, found, part, panel)
        return result

    @property
    def damping(self) -> float:
        """λ, given or chosen."""
        return self._strength()

    def quadratic_form(self, vector: jax.Array) -> float:
        """``vᵀ F v = Σ_B λ ‖v_B‖² + (1/N) Σ_n (g_nB · v_B)²`` over the blocks B.

        Args:
            vector: v, [d]; zero for weights in no block.
        """
        total = 0.0
        for part, panel, gradients in self._panels("loss model blocks"):
            vectors = self._take(vector, part, panel)
            total += float(_forms(gradients, vectors, self._strength()))
        return total

    def slope(self, targets: jax.Array) -> jax.Array:
        """``ḡ = -Gᵀy / N``: down it, the rows change by y [d].

        Args:
            targets: y, [N].
        """
        result = self._zeros()
        for part, panel, gradients in self._panels("slope blocks"):
            result = self._put(result, _slopes(gradients, targets), part, panel)
        return result

    def choose_damping(
        self,
        support: jax.Array,
        missing: jax.Array,
        targets: jax.Array,
        least: float = 0.0,
    ) -> ChosenDamping:
        """Takes the damping by leave-one-out from here on; see :func:`choose_damping`.

        What is to be predicted is ``b = G v + y``.

        Args:
            support: Weights of which the others predict one row [d], bool.
            missing: v, [d].
            targets: y, [N].
            least: Of its multiples; default 0.

        Returns:
            The damping, the same for all blocks.
        """
        number = self._settings.num_samples
        gram, right = jnp.zeros((number, number), jnp.float32), targets
        for part, panel, gradients in self._panels("damping blocks"):
            more = _gram_and_missing(
                gradients,
                self._take(support, part, panel),
                self._take(missing, part, panel),
            )
            gram, right = gram + more[0], right + more[1]
        chosen = choose_damping(gram, right, least)
        self._damping, self._factors = chosen.damping, {}
        self._chosen = None
        if self._is_one_block():
            # Its factor is N³ from here; from the gradients N²c.
            self._chosen = shifted_factor(gram, number * chosen.damping)[None]
        return chosen

    def _strength(self) -> float:
        assert self._damping is not None, "choose_damping comes first"
        return self._damping

    def _is_one_block(self) -> bool:
        (part, *more) = self._storage.parts
        if more or len(part.panels) > 1 or part.panels[0].num_blocks > 1:
            return False
        return (
            self._settings.mesh is None
            and self._solver(part.panels[0]) == "sample_space"
        )

    # ------------------------------------------------------------- gradients by panels

    def _collected(self, part: Part) -> Store:
        started = time.perf_counter()
        settings, place = self._settings, self._storage.store
        store = new_store(
            "device" if place == "recompute" else place,
            part,
            settings.num_samples,
            settings.store_dtype,
            settings.mesh,
            self._folder,
        )
        try:
            chunks = self._gradients(part.order)
            collect(chunks, part, store, settings.store_dtype, settings.mesh)
        except BaseException:
            store.close()
            raise
        self.seconds_gradients += time.perf_counter() - started
        return store

    def _panels(self, label: str) -> Iterator[tuple[Part, Panel, jax.Array]]:
        """Every panel with its gradients [blocks, N, c], and progress after it."""
        sizes = [
            panel.num_blocks * len(part.indices)
            for part in self._storage.parts
            for panel in part.panels
        ]
        done, total = 0, sum(sizes)
        self._settings.progress(label, done, total)
        # There and back: the end of one sweep is still in the system's cache.
        step, self._step = self._step, -self._step
        for part in self._storage.parts:
            store, panels = self._store or self._collected(part), part.panels[::step]
            try:
                for panel, gradients in zip(panels, store.panels(panels), strict=True):
                    if self._settings.centered:
                        gradients = _centered(gradients)
                    yield part, panel, gradients
                    done += panel.num_blocks * len(part.indices)
                    self._settings.progress(label, done, total)
            finally:
                if store is not self._store:
                    store.close()

    # -------------------------------------------------- between panels and flat vectors

    def _solver(self, panel: Panel) -> str:
        if self._settings.solver != "auto":
            return self._settings.solver
        return choose_solver(self._settings.num_samples, panel.width)

    def _index(self, part: Part, panel: Panel) -> np.ndarray:
        """Where the panel's weights stand in the flat vector [blocks, c]."""
        columns = slice(part.first + panel.start, part.first + panel.stop)
        return self._storage.whole.indices[:, columns].reshape(-1, panel.width)

    def _zeros(self) -> jax.Array:
        zeros = jnp.zeros(self._storage.whole.order.size, jnp.float32)
        return replicate(zeros, self._settings.mesh)

    def _put(
        self, vector: jax.Array, values: jax.Array, part: Part, panel: Panel
    ) -> jax.Array:
        return _put(vector, values, self._index(part, panel), self._settings.mesh)

    def _take(self, vector: jax.Array, part: Part, panel: Panel) -> jax.Array:
        return _take(vector, self._index(part, panel), self._settings.mesh)


@jax.jit
def _centered(gradients: jax.Array) -> jax.Array:
    """G - 1ḡᵀ of each block, so that GᵀG / N is F - ḡḡᵀ."""
    wide = gradients.astype(jnp.float32)
    return wide - jnp.mean(wide, axis=1, keepdims=True)


@jax.jit
def _forms(gradients: jax.Array, vectors: jax.Array, damping: float) -> jax.Array:
    """Σ_B v_Bᵀ F_B v_B over the blocks of a panel."""
    along = matmul(gradients.astype(jnp.float32), vectors[..., None])
    squares = jnp.sum(along * along) / gradients.shape[1]
    return squares + damping * jnp.sum(vectors * vectors)


@jax.jit
def _multiplied(gradients: jax.Array, vectors: jax.Array, damping: float) -> jax.Array:
    """F_B v_B of each block of a panel."""
    wide = gradients.astype(jnp.float32)
    strength = jnp.asarray(damping)
    return jax.vmap(fisher_product, (0, None, 0))(wide, strength, vectors)


@jax.jit
def _leverages(gradients: jax.Array, kept: jax.Array, damping: float) -> jax.Array:
    """Values h of each block of a panel."""

    def one_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, support = block
        wide = rows.astype(jnp.float32)
        gram = gram_matrix(jnp.where(support, wide, 0.0))
        whitened = matmul(shifted_factor(gram, len(rows) * damping), wide)
        return jnp.sum(whitened * whitened, axis=0)

    return jax.lax.map(one_block, (gradients, kept))


@jax.jit
def _slopes(gradients: jax.Array, targets: jax.Array) -> jax.Array:
    """-Gᵀy / N of each block of a panel."""
    along = matmul(targets[None], gradients.astype(jnp.float32))
    return -along[:, 0] / gradients.shape[1]


@jax.jit
def _gram_and_missing(
    gradients: jax.Array, support: jax.Array, missing: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Σ_B G_S G_Sᵀ and Σ_B G v over the blocks of a panel."""
    wide = gradients.astype(jnp.float32)

    def one_block(
        block: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        rows, kept, vector = block
        products = matmul(rows, vector[:, None])[:, 0]
        return gram_matrix(jnp.where(kept, rows, 0.0)), products

    grams, products = jax.lax.map(one_block, (wide, support, missing))
    return jnp.sum(grams, axis=0), jnp.sum(products, axis=0)


@partial(jax.jit, static_argnames="mesh", donate_argnames="total")
def _added(
    total: jax.Array, values: jax.Array, index: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """Adds what is known of some groups [blocks, groups * choices] to their rows."""
    rows = held(values, mesh).reshape(-1, total.shape[1])
    return total.at[index.reshape(-1)].add(rows, mode="drop")


@partial(jax.jit, static_argnames="mesh", donate_argnames="vector")
def _put(
    vector: jax.Array, values: jax.Array, index: jax.Array, mesh: Mesh | None
) -> jax.Array:
    return blocks.scatter(vector, index, held(values, mesh))


@partial(jax.jit, static_argnames="mesh")
def _take(vector: jax.Array, index: jax.Array, mesh: Mesh | None) -> jax.Array:
    return held(blocks.gather(vector, index), mesh, AXIS)
