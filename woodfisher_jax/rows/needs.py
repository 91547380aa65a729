"""What a pruning step needs: the numbers of its memory plan."""

from typing import NamedTuple


class Phase(NamedTuple):
    """One phase of a step.

    Attributes:
        name: "gradients", "curvature" or "update".
        flops: Floating-point operations over all devices; a multiply-add is two.
        bytes_moved: Gradients written to the store or read from it, over all devices.
        peak_bytes: Most memory of this process in this phase; with accelerators, of one
            of them.
    """

    name: str
    flops: float
    bytes_moved: int
    peak_bytes: int


class Passes(NamedTuple):
    """What passes over the samples need by themselves.

    Attributes:
        bytes: Memory of a device for the examples that go through the network at once,
            and for what is accumulated over them.
        flops: Of all passes, a multiply-add being two; nan where the compiler does not
            report it.
        bytes_after: Memory of what follows the last pass, on the host.
        flops_after: Its operations.
    """

    bytes: int
    flops: float
    bytes_after: int = 0
    flops_after: float = 0.0


class Needs(NamedTuple):
    """What a step needs, as planned.

    Attributes:
        store: Where the gradients wait between statistic and update, one of
            :data:`~woodfisher_jax.rows.compute.STORES`; "" where none are kept.
        store_dtype: Their dtype there.
        store_bytes: Their size there, over all devices.
        passes: Passes over the samples for one use of the gradients: more than one only
            for "recompute".
        keep_factors: Whether the factors of the diagonal are kept for the update.
        microbatch_size: Examples that go through the network at once on a device.
        num_weights: d, prunable weights.
        num_samples: N, gradients.
        batch_size: m, examples each gradient is the mean over.
        blocks: (width, number of blocks, solver) of each group.
        phases: See :class:`Phase`.
        limit_bytes: Memory that this process may take; with accelerators, that one of
            them has.
    """

    store: str
    store_dtype: str
    store_bytes: int
    passes: int
    keep_factors: bool
    microbatch_size: int
    num_weights: int
    num_samples: int
    batch_size: int
    blocks: tuple[tuple[int, int, str], ...]
    phases: tuple[Phase, ...]
    limit_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The largest of the phases."""
        return max(phase.peak_bytes for phase in self.phases)
