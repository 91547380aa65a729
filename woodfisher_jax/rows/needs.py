"""What a pruning step takes: the numbers of its plan."""

from typing import NamedTuple


class Phase(NamedTuple):
    """One phase of a step.

    Attributes:
        name: "gradients", "curvature" or "update".
        flops: Floating-point operations, a multiply-add being two, over all devices.
        bytes_moved: Gradients written to the store or read from it, over all devices.
        peak_bytes: Most memory of this process in this phase; with accelerators, of one
            of them.
    """

    name: str
    flops: float
    bytes_moved: int
    peak_bytes: int


class Passes(NamedTuple):
    """What a curvature takes whose gradients are not kept, by itself.

    Attributes:
        bytes: Memory for the examples that go through the network at once, and for
            what is added up over them.
        flops: Of all passes, a multiply-add being two; nan where the compiler does not
            say.
        bytes_after: Memory of what follows the last pass, on the host.
        flops_after: Its operations.
    """

    bytes: int
    flops: float
    bytes_after: int = 0
    flops_after: float = 0.0


class Needs(NamedTuple):
    """What a step takes, as planned.

    Attributes:
        store: Where gradients wait: a key of STORES, or "" where none are kept.
        store_dtype: How.
        store_bytes: Room for all of them, over all devices.
        passes: How many times all examples are gone through for one use of the
            gradients: more than one only for "recompute".
        keep_factors: Whether the factors of the diagonal are kept for the update.
        microbatch_size: Examples that go through the network at once on a device.
        num_weights: d, prunable weights.
        num_samples: N.
        batch_size: m.
        blocks: (width, number of blocks, solver) of each group.
        phases: See :class:`Phase`.
        limit_bytes: Memory that this process may take (an accelerator: has).
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
