"""The arguments of a pruning step, checked before anything starts."""

import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from woodfisher_jax.pruning.fisher import SOLVERS
from woodfisher_jax.pruning.gradients import LossFn
from woodfisher_jax.pruning.methods import Method, method_named, scope_of
from woodfisher_jax.pruning.paths import Params, leaves_by_path
from woodfisher_jax.pruning.samples import batch_length, num_examples, regroup
from woodfisher_jax.pruning.sharding import one_axis

STORES = ("device", "host", "disk", "recompute")
"""Where gradients wait between the statistic and the update, the fastest first."""

STORE_DTYPES = ("float32", "bfloat16")
"""How they are kept; products are in float32 either way."""

Progress = Callable[[str, int, int], None]
"""Called during long work with (label, done, total)."""


class Settings(NamedTuple):
    """What the steps of pruning share; :func:`check_settings` checks it.

    Attributes:
        method: Row of the table.
        scope: "global" or "layer".
        sparsity: Of all prunable weights afterwards, [0, 1).
        damping: λ > 0.
        num_samples: N; 0 for methods without gradients.
        batch_size: m.
        microbatch_size: Most examples whose gradients are formed at once, or None for
            as many as fit.
        block_size: c, or None for whole tensors.
        scale_update: Factor on δw.
        solver: "auto" or a key of SOLVERS.
        store: "auto" or one of STORES.
        store_dtype: "float32" or "bfloat16".
        store_dir: Parent of the folder for gradients on disk; default the system's.
        memory_limit: Bytes that this process may take, or None for what is free.
        mesh: All devices in one axis, or None for one device.
        progress: Called with (label, done, total).
    """

    method: Method
    scope: str
    sparsity: float
    damping: float
    num_samples: int
    batch_size: int
    microbatch_size: int | None
    block_size: int | None
    scale_update: float
    solver: str
    store: str
    store_dtype: str
    store_dir: Path | None
    memory_limit: int | None
    mesh: Mesh | None
    progress: Progress


def check_settings(
    samples: Any,
    *,
    sparsity: float,
    method: str = "woodfisherblock",
    scope: str | None = None,
    damping: float = 1e-5,
    num_samples: int | None = None,
    batch_size: int = 1,
    microbatch_size: int | None = None,
    block_size: int | None = None,
    scale_update: float = 1.0,
    solver: str = "auto",
    store: str = "auto",
    store_dtype: str = "float32",
    store_dir: str | Path | None = None,
    memory_limit: float | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[Settings, Any]:
    """Checks the arguments of :func:`woodfisher_jax.prune`.

    Returns:
        The settings, and the samples in a form that can be read more than once; None
        for a method that needs none.

    Raises:
        ValueError: If an argument is out of range or samples are too few.
    """
    row = method_named(method)
    scope = scope_of(method, scope)
    real = {"sparsity": sparsity, "damping": damping, "scale_update": scale_update}
    for name, value in real.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}; expected a number")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity}; expected a fraction in [0, 1), such as 0.9"
        )
    # Within float32, with room for its inverse.
    if not 1e-30 <= damping <= 1e30:
        raise ValueError(
            f"damping={damping}; expected a positive number, such as 1e-5 "
            "(from 1e-30 to 1e30)"
        )
    if not abs(scale_update) < float("inf"):
        raise ValueError(
            f"scale_update={scale_update}; expected a number, 1 for the whole update "
            "and 0 for none"
        )
    if solver != "auto" and solver not in SOLVERS:
        raise ValueError(
            f"solver={solver!r}; expected 'auto' or one of {list(SOLVERS)}"
        )
    if store not in ("auto", *STORES):
        raise ValueError(f"store={store!r}; expected 'auto' or one of {list(STORES)}")
    if store_dtype not in STORE_DTYPES:
        raise ValueError(
            f"store_dtype={store_dtype!r}; expected one of {list(STORE_DTYPES)}"
        )
    if memory_limit is not None and not memory_limit > 0:
        raise ValueError(
            f"memory_limit={memory_limit}; expected a number of bytes, such as 10e9"
        )
    integers = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "microbatch_size": microbatch_size,
        "block_size": block_size,
    }
    for name, number in integers.items():
        if number is None and name != "batch_size":
            continue
        if not isinstance(number, numbers.Integral) or number < 1:
            raise ValueError(f"{name}={number}; expected a whole number, 1 or more")
    if row.curvature is None:
        samples, count = None, 0
    else:
        samples, count = _counted(samples, num_samples, batch_size)
    settings = Settings(
        method=row,
        scope=scope,
        sparsity=float(sparsity),
        damping=float(damping),
        num_samples=count,
        batch_size=int(batch_size),
        microbatch_size=None if microbatch_size is None else int(microbatch_size),
        block_size=None if block_size is None else int(block_size),
        scale_update=float(scale_update),
        solver=solver,
        store=store,
        store_dtype=store_dtype,
        store_dir=None if store_dir is None else Path(store_dir),
        memory_limit=None if memory_limit is None else int(memory_limit),
        mesh=one_axis(mesh),
        progress=progress or (lambda label, done, total: None),
    )
    return settings, samples


def _counted(samples: Any, num_samples: int | None, batch_size: int) -> tuple[Any, int]:
    """Samples that can be read more than once, and N."""
    if samples is None:
        raise ValueError(
            "samples is missing; expected a batch or an iterable of batches, since "
            "this method estimates curvature from gradients"
        )
    total = num_examples(samples)
    if total is None:
        # A generator can be read only once, and the loss is checked on an example
        # before the gradients start; so what is needed is kept.
        needed = None if num_samples is None else num_samples * batch_size
        taken: list[Any] = []
        total = 0
        for batch in regroup(samples, min(needed or 1024, 1024)):
            taken.append(batch)
            total += batch_length(batch)
            if needed is not None and total >= needed:
                break
        samples = taken
    count = total // batch_size if num_samples is None else int(num_samples)
    if count < 1 or count * batch_size > total:
        raise ValueError(
            f"samples hold {total} examples, but num_samples={num_samples} gradients "
            f"of batch_size={batch_size} need {max(count, 1) * batch_size}; give more "
            "examples or lower one of the two"
        )
    return samples, count


def check_params(params: Params) -> None:
    """Raises unless all leaves are floating-point arrays.

    Raises:
        TypeError: With the path of the first other leaf.
    """
    for path, leaf in leaves_by_path(params).items():
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params[{path!r}] has type {kind}; expected floating-point arrays "
                "only. Keep counters and indices out of params, in the closure of "
                "loss_fn for instance"
            )


def check_loss(loss_fn: LossFn, params: Params, samples: Any) -> None:
    """Raises unless the loss of one example is a floating-point scalar.

    Raises:
        TypeError: With what it returned.
    """
    example = next(regroup(samples, 1))
    found = jax.eval_shape(loss_fn, params, example)
    if (
        not hasattr(found, "shape")
        or found.shape != ()
        or not jnp.issubdtype(found.dtype, jnp.floating)
    ):
        raise TypeError(
            "loss_fn must return a scalar, the mean loss over the batch; for a batch "
            f"of one example it returned {found}"
        )
