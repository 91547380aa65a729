"""What a pruning step may take of the machine."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import threadpoolctl
from jax.sharding import Mesh

from woodfisher_jax.equations.fisher import SOLVERS, choose_solver
from woodfisher_jax.options import Options, checked, fields_of, option
from woodfisher_jax.progress import live

STORES = ("device", "host", "disk", "recompute")
"""Where gradients are stored between statistic and update, the fastest first."""

STORE_DTYPES = ("float32", "bfloat16")
"""How they are kept; products are in float32 either way."""

Progress = Callable[[str, int, int], None]
"""Called during long work with (label, done, total)."""


@dataclasses.dataclass(frozen=True)
class Compute(Options):
    """Memory, precision of the store, devices: nothing that changes the result.

    Results agree to rounding whatever is set here, but for ``store_dtype="bfloat16"``,
    which rounds the gradients to three digits.
    """

    microbatch_size: int | None = option(
        None,
        "Most examples whose gradients a device forms at once; default 128, or as many "
        "as fit.",
        least=1,
    )
    solver: str = option(
        "auto",
        "How a block is inverted; auto takes the one with less arithmetic.",
        choices=("auto", *SOLVERS),
    )
    store: str = option(
        "auto",
        "Where gradients are stored between statistic and update: device, host, disk, "
        "or recompute (nowhere: they are formed twice, for a part of the weights at a "
        "time); auto takes the first that fits.",
        choices=("auto", *STORES),
    )
    store_dtype: str = option(
        "float32",
        "Precision of the stored gradients; bfloat16 halves their memory and rounds "
        "them to three digits.",
        choices=STORE_DTYPES,
    )
    store_dir: str | Path | None = option(
        None,
        "Parent of the folder for gradients on disk; default the system's folder for "
        "temporary files.",
    )
    memory_limit: float | None = option(
        None,
        "Most memory to take, in bytes; default what is free.",
        least=1,
        in_config=False,
    )
    mesh: Mesh | None = option(
        None,
        "Devices to spread samples and blocks over, the same in every process; default "
        "one.",
    )
    progress: Progress | bool = option(
        True,
        "Whether to show progress, on a terminal and in notebooks; or a function, "
        "called with (label, done, total) during long work.",
        in_config=False,
    )

    def solver_for(self, num_samples: int, width: int) -> str:
        """The solver of a block of this width."""
        if self.solver != "auto":
            return self.solver
        return choose_solver(num_samples, width)

    def report(self, label: str, done: int, total: int) -> None:
        """Passes progress on to whoever wants to know."""
        if callable(self.progress):
            self.progress(label, done, total)


@functools.cache
def _lapack() -> threadpoolctl.ThreadpoolController:
    """The threads of the library that JAX takes its LAPACK from on a CPU."""
    # Loads that library, which importing this package does not need.
    import scipy.linalg  # noqa: F401

    every = threadpoolctl.ThreadpoolController()
    paths = [lib.filepath for lib in every.lib_controllers]
    own = [path for path in paths if "scipy" in Path(path).parent.as_posix()]
    return every.select(filepath=own or paths)


@contextmanager
def one_lapack_thread() -> Iterator[None]:
    """LAPACK on one thread, as a context or a decorator.

    Its systems are small, and OpenBLAS's threads wait for one another by spinning:
    beside another busy process that takes four times as long.
    """
    with _lapack().limit(limits=1):
        yield


F = TypeVar("F", bound=Callable[..., Any])


def watched(function: F) -> F:
    """Shows the progress of a function that takes options of :class:`Compute`.

    The function gets the option ``progress`` as a callback, which it passes on to what
    it calls: a display is that of the outermost call.
    """

    @functools.wraps(function)
    def shown(*args: Any, **options: Any) -> Any:
        given = options.get(
            "progress", getattr(options.get("compute"), "progress", True)
        )
        given = checked(fields_of(Compute)["progress"], given)
        if callable(given):
            return function(*args, **options | {"progress": given})
        with live("pruning", quiet=not given or jax.process_index() > 0) as callback:
            return function(*args, **options | {"progress": callback})

    return shown  # type: ignore[return-value]
