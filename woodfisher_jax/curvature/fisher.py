"""Optimal Brain Surgeon with the damped empirical Fisher of blocks of weights."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import ClassVar, Literal

import jax
import numpy as np

from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.curvature.method import Built, Sampled
from woodfisher_jax.curvature.sources import Stored
from woodfisher_jax.equations import obs
from woodfisher_jax.options import OptionError, option
from woodfisher_jax.rows.disk import locked_folder
from woodfisher_jax.rows.memory_plan import (
    SLOPE_BYTES,
    VECTOR_BYTES,
    Storage,
    plan_rows,
)
from woodfisher_jax.rows.needs import Needs
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.trees import blocks
from woodfisher_jax.trees.blocks import FlatOrder, Layout

AUTO = "auto"
"""The damping that leave-one-out over the gradients chooses."""

INVERTIBLE = {"least": 1e-30, "most": 1e30}
"""Range of a damping: within float32, with room for its inverse."""

UPDATES = ("sum", "joint", "none")
"""How the other weights move: by the sum of single-weight updates, to the minimum of
the quadratic model with all removals together, or not at all."""

LayoutOf = Callable[[FlatOrder, int | None, np.ndarray | None], Layout]
"""(flat order, block size, active weights) -> which weights share a block."""


@dataclasses.dataclass(frozen=True)
class Surgeon(Sampled):
    """Optimal Brain Surgeon with some inverse: the other weights compensate."""

    damping: float | Literal["auto"] = option(
        1e-5,
        "λ, added to the Fisher's diagonal; auto takes the one by which each gradient "
        "is best predicted from the others, for the joint update also by the losses "
        "after it.",
        **INVERTIBLE,
    )
    weight_decay: float = option(
        0.0,
        "Weight decay of the training, added to the damping.",
        least=0,
        most=1e30,
        in_config=False,
    )
    update: str = option(
        "sum",
        "How the other weights move: sum (the paper's, as if each weight were removed "
        "alone), joint (to the minimum of the quadratic model with all of them "
        "removed) or none.",
        choices=UPDATES,
    )
    scale_update: float = option(
        1.0, "Factor on the update; 0 leaves the other weights where they are."
    )
    normalize_update: float | None = option(
        None,
        "Largest norm of the update of a tensor, in norms of its weights; a longer one "
        "is shortened. Default no limit.",
        above=0,
    )

    @property
    def strength(self) -> float:
        """λ with weight decay."""
        assert isinstance(self.damping, float)
        return self.damping + self.weight_decay

    @property
    def moves(self) -> bool:
        """Whether the other weights move."""
        return self.update != "none" and self.scale_update != 0

    is_quadratic: ClassVar[bool] = True

    def saliency(self, weights: jax.Array, diagonal: jax.Array | None) -> jax.Array:
        """See :func:`woodfisher_jax.equations.obs.obs_saliency`."""
        assert diagonal is not None
        return obs.obs_saliency(weights, diagonal)


@dataclasses.dataclass(frozen=True)
class WoodFisher(Surgeon):
    """Optimal Brain Surgeon with the inverse of the damped empirical Fisher.

    Attributes:
        layout: Which weights share a block.
    """

    layout: LayoutOf = blocks.within_tensors
    block_size: int | None = option(
        None,
        "c, weights a block; default whole tensors, or for woodfisher all tensors in "
        "one block.",
        least=1,
    )
    centered: bool = option(
        False, "Take the covariance of the gradients, F - ḡḡᵀ, in place of F."
    )
    swaps: int = option(
        0,
        "Most rounds in which pruned weights take the places of kept ones while the "
        "model loss of the joint update falls; 20 is plenty.",
        least=0,
    )

    def __post_init__(self) -> None:
        """Checks the options, alone and together.

        Raises:
            OptionError: Naming the option, what was expected and what came.
        """
        super().__post_init__()
        if self.damping == AUTO and self.weight_decay:
            raise OptionError(
                "damping",
                f"damping='auto' with weight_decay={self.weight_decay}, which would be "
                "added to it; expected weight_decay=0, or a number such as 1e-5",
            )
        if self.swaps and self.update != "joint":
            raise OptionError(
                "swaps",
                f"swaps={self.swaps} with update={self.update!r}; expected "
                "update='joint', whose loss the swaps follow",
            )
        if self.first_order and self.update == "joint" and self.centered:
            raise OptionError(
                "centered",
                "centered=True with update='joint' in a method of first order, which "
                "takes the mean of the Fisher's own gradients; expected centered=False",
            )

    def plan(self, problem: Problem) -> Needs:
        """See :meth:`Sampled.plan`."""
        return self.planned(problem)[0]

    def planned(self, problem: Problem) -> tuple[Needs, Storage]:
        """What the step takes, and where its gradients wait.

        Raises:
            MemoryLimitError: If it does not fit; the message says what would.
        """
        active = blocks.flat_mask(problem.order, problem.masks)
        layout = self.layout
        if layout is blocks.full_matrix:
            layout = partial(layout, num_samples=problem.num_samples)
        needs, storage = plan_rows(
            problem,
            layouts=lambda size: layout(problem.order, size, active),
            block_size=self.block_size,
            vector_bytes=VECTOR_BYTES + (SLOPE_BYTES if self.first_order else 0),
        )
        assert storage is not None
        return needs, storage

    def build(self, problem: Problem) -> Built:
        """See :meth:`Sampled.build`; with damping="auto" λ is not chosen yet."""
        needs, storage = self.planned(problem)
        damping = np.nan if self.damping == AUTO else self.strength
        source = Stored(problem, storage, needs.microbatch_size)
        return Built(_stored(InverseFisher(source, damping, self.centered)), needs)


@contextmanager
def _stored(fisher: InverseFisher) -> Iterator[InverseFisher]:
    """Forms the gradients, if they are to be stored, and gives the room back."""
    source = fisher.source
    assert isinstance(source, Stored)
    place = source.storage.store
    if place == "recompute":
        yield fisher
        return
    (only,) = source.storage.passes
    on_disk = place == "disk"
    with locked_folder(source.compute.store_dir) if on_disk else nullcontext() as where:
        store = source.collected(only, place, where)
        try:
            filled = dataclasses.replace(source, store=store)
            yield dataclasses.replace(fisher, source=filled)
        finally:
            store.close()
