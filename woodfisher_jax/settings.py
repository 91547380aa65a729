"""The arguments of a pruning step, checked before anything starts."""

import math
import numbers
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from woodfisher_jax.curvature.hessian import ESTIMATORS
from woodfisher_jax.equations.fisher import SOLVERS
from woodfisher_jax.methods import (
    UPDATES,
    Method,
    check_options,
    method_named,
    scope_of,
)
from woodfisher_jax.recompute import degree_of
from woodfisher_jax.rows.inputs import counted
from woodfisher_jax.rows.sharding import one_axis
from woodfisher_jax.selection.patterns import GroupNames, Pattern, check_goal, parse
from woodfisher_jax.tracing.macs import RESCALINGS
from woodfisher_jax.trees.samples import regroup

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
        pattern: What stays or goes together; None for single weights.
        sparsity: Of all prunable weights afterwards, [0, 1); None with a FLOP target.
        flops_target: MACs of one example afterwards, in millions, or None.
        flops_power: Exponent of the MACs that the scores are divided by; 0 for none.
        flops_per_parameter: Whether a layer counts by one of its weights.
        flops_normalize: A key of RESCALINGS.
        damping: λ > 0, weight decay included; None where gradients choose it.
        centered: Whether F is the covariance of the gradients.
        pi: Whether the damping of Kronecker factors follows their traces.
        hessian: A key of ESTIMATORS.
        num_probes: P, of "hutchinson".
        probe_seed: Of its signs.
        num_samples: N; 0 for methods without gradients.
        batch_size: m.
        microbatch_size: Most examples whose gradients are formed at once, or None for
            as many as fit.
        block_size: c, or None for whole tensors.
        update: One of UPDATES.
        scale_update: Factor on δw.
        normalize_update: Largest ‖δw‖ / ‖w‖ of a tensor, or None.
        swaps: Most rounds of swaps between weights that stay and that go.
        recompute: R, fresh curvatures on the way to the target.
        recompute_degree: Of the way; 1 is linear, None exponential.
        solver: "auto" or a key of SOLVERS.
        store: "auto" or one of STORES.
        store_dtype: "float32" or "bfloat16".
        store_dir: Parent of the folder for gradients on disk; default the system's.
        memory_limit: Bytes that this process may take, or None for what is free.
        mesh: All devices in one axis, or None for one device.
        diagnostics: Whether to compute what is only of interest.
        progress: Called with (label, done, total).
    """

    method: Method
    scope: str
    pattern: Pattern | None
    sparsity: float | None
    flops_target: float | None
    flops_power: float
    flops_per_parameter: bool
    flops_normalize: str
    damping: float | None
    centered: bool
    pi: bool
    hessian: str
    num_probes: int
    probe_seed: int
    num_samples: int
    batch_size: int
    microbatch_size: int | None
    block_size: int | None
    update: str
    scale_update: float
    normalize_update: float | None
    swaps: int
    recompute: int
    recompute_degree: float | None
    solver: str
    store: str
    store_dtype: str
    store_dir: Path | None
    memory_limit: int | None
    mesh: Mesh | None
    diagnostics: bool
    progress: Progress

    @property
    def counts_macs(self) -> bool:
        """Whether the choice of weights depends on what they cost."""
        return self.flops_target is not None or self.flops_power > 0

    @property
    def completes_pattern(self) -> bool:
        """Whether all groups of N:M are to obey it, not only the cheapest."""
        own = self.pattern.sparsity if self.pattern else None
        return own is not None and (self.sparsity or 0.0) > own - 1e-6


def check_settings(
    samples: Any,
    *,
    sparsity: float | None = None,
    method: str = "woodfisherblock",
    scope: str | None = None,
    pattern: str | GroupNames | None = None,
    flops_target: float | None = None,
    flops_power: float = 0.0,
    flops_per_parameter: bool = False,
    flops_normalize: str = "none",
    damping: float | str = 1e-5,
    weight_decay: float = 0.0,
    centered: bool = False,
    pi: bool = False,
    hessian: str = "exact",
    num_probes: int = 64,
    probe_seed: int = 0,
    num_samples: int | None = None,
    batch_size: int = 1,
    microbatch_size: int | None = None,
    block_size: int | None = None,
    update: str = "sum",
    scale_update: float = 1.0,
    normalize_update: float | None = None,
    swaps: int = 0,
    recompute: int = 0,
    recompute_schedule: str = "linear",
    recompute_degree: float | None = None,
    solver: str = "auto",
    store: str = "auto",
    store_dtype: str = "float32",
    store_dir: str | Path | None = None,
    memory_limit: float | None = None,
    mesh: Mesh | None = None,
    diagnostics: bool = False,
    progress: Progress | None = None,
    mean_samples: Any = None,
    targets: Any = None,
) -> tuple[Settings, Any]:
    """Checks the arguments of :func:`woodfisher_jax.prune`.

    Returns:
        The settings, and the samples in a form that can be read more than once; None
        for a method that needs none.

    Raises:
        ValueError: If an argument is out of range, makes no sense for the method, or
            samples are too few.
    """
    row = method_named(method)
    scope = scope_of(method, scope)
    check_options(
        method,
        {
            "damping": damping,
            "block_size": block_size,
            "solver": solver,
            "store": store,
            "store_dtype": store_dtype,
            "scale_update": scale_update,
            "weight_decay": weight_decay,
            "update": update,
            "centered": centered,
            "mean_samples": mean_samples,
            "targets": targets,
            "normalize_update": normalize_update,
            "swaps": swaps,
            "pi": pi,
            "hessian": hessian,
            "num_probes": num_probes,
            "probe_seed": probe_seed,
            "flops_power": flops_power,
            "flops_per_parameter": flops_per_parameter,
            "flops_normalize": flops_normalize,
            "flops_target": flops_target,
            "recompute": recompute,
        },
    )
    rule = parse(pattern)
    if rule is not None:
        check_goal(rule, sparsity, scope, flops_target, flops_power)
        sparsity = rule.sparsity if sparsity is None else sparsity
    _check_goal(sparsity, flops_target, flops_power, scope)
    strength = _damping(damping, weight_decay, row)
    _check_curvature(solver, store, store_dtype, memory_limit)
    _check_choice("hessian", hessian, ESTIMATORS)
    _check_probes(hessian, num_probes, probe_seed)
    _check_choice("flops_normalize", flops_normalize, RESCALINGS)
    _check_choice("update", update, UPDATES)
    _check_update(scale_update, normalize_update)
    _check_swaps(swaps, update, pattern, scope, flops_target, flops_power)
    if row.first_order:
        _check_slope(update, centered, mean_samples, targets, recompute)
    _check_whole(
        num_samples=num_samples,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        block_size=block_size,
        num_probes=num_probes,
    )
    settings = Settings(
        method=row,
        scope=scope,
        pattern=rule,
        sparsity=None if sparsity is None else float(sparsity),
        flops_target=None if flops_target is None else float(flops_target),
        flops_power=float(flops_power),
        flops_per_parameter=bool(flops_per_parameter),
        flops_normalize=flops_normalize,
        damping=strength,
        centered=bool(centered),
        pi=bool(pi),
        hessian=hessian,
        num_probes=int(num_probes),
        probe_seed=int(probe_seed),
        num_samples=0,
        batch_size=int(batch_size),
        microbatch_size=None if microbatch_size is None else int(microbatch_size),
        block_size=None if block_size is None else int(block_size),
        update=update,
        scale_update=0.0 if update == "none" else float(scale_update),
        normalize_update=normalize_update,
        swaps=int(swaps),
        recompute=_recomputations(recompute),
        recompute_degree=degree_of(recompute_schedule, recompute_degree),
        solver=solver,
        store=store,
        store_dtype=store_dtype,
        store_dir=None if store_dir is None else Path(store_dir),
        memory_limit=None if memory_limit in (None, math.inf) else int(memory_limit),
        mesh=one_axis(mesh),
        diagnostics=bool(diagnostics),
        progress=progress or (lambda label, done, total: None),
    )
    return check_samples(settings, samples, num_samples)


def _real(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}; expected a number")


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {list(choices)}")


def _check_whole(**values: Any) -> None:
    for name, number in values.items():
        if number is None and name not in ("batch_size", "num_probes"):
            continue
        if not isinstance(number, numbers.Integral) or number < 1:
            raise ValueError(f"{name}={number}; expected a whole number, 1 or more")


def _check_probes(hessian: str, num_probes: Any, probe_seed: Any) -> None:
    whole = isinstance(probe_seed, numbers.Integral)
    if not whole or not 0 <= int(probe_seed) < 2**32:
        raise ValueError(
            f"probe_seed={probe_seed}; expected a whole number from 0 to {2**32 - 1}"
        )
    if hessian != "hutchinson" and (num_probes, probe_seed) != (64, 0):
        raise ValueError(
            f"num_probes={num_probes}, probe_seed={probe_seed} with hessian="
            f"{hessian!r}, which has no probes; expected hessian='hutchinson'"
        )


def _check_goal(
    sparsity: float | None,
    flops_target: float | None,
    flops_power: float,
    scope: str,
) -> None:
    """How far, and whether costs can have a say in it."""
    if (sparsity is None) == (flops_target is None):
        raise ValueError(
            f"sparsity={sparsity} and flops_target={flops_target}; expected exactly "
            "one of them: a fraction in [0, 1), or millions of multiply-accumulates"
        )
    _real(flops_power=flops_power)
    if sparsity is not None:
        _real(sparsity=sparsity)
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity={sparsity}; expected a fraction in [0, 1), such as 0.9"
            )
    else:
        _real(flops_target=flops_target)
        if not 0 < flops_target < float("inf"):  # type: ignore[operator]
            raise ValueError(
                f"flops_target={flops_target}; expected millions of "
                "multiply-accumulates for one example, such as 10"
            )
    if not 0 <= flops_power < float("inf"):
        raise ValueError(
            f"flops_power={flops_power}; expected a finite number of 0 or more"
        )
    if scope != "global" and (flops_target is not None or flops_power):
        raise ValueError(
            f"scope={scope!r} with flops_power={flops_power} and flops_target="
            f"{flops_target}; expected scope='global', for only there layers compete"
        )


AUTO = "auto"
"""The damping that the gradients choose among themselves."""


def _damping(damping: float | str, weight_decay: float, row: Method) -> float | None:
    """λ with weight decay added; None for AUTO."""
    _real(weight_decay=weight_decay)
    if not 0 <= weight_decay <= 1e30:
        raise ValueError(
            f"weight_decay={weight_decay}; expected what training adds to the "
            "gradient, such as 1e-4, or 0"
        )
    if damping == AUTO:
        if weight_decay or row.curvature not in (None, "inverse"):
            raise ValueError(
                "damping='auto' is for methods whose Fisher has blocks, and has no "
                f"weight_decay={weight_decay} added; give a number, such as 1e-5"
            )
        return None
    if isinstance(damping, str):
        raise ValueError(f"damping={damping!r}; expected a number, or 'auto'")
    _real(damping=damping)
    # Within float32, with room for its inverse.
    if not 1e-30 <= damping <= 1e30:
        raise ValueError(
            f"damping={damping}; expected a positive number, such as 1e-5 "
            "(from 1e-30 to 1e30), or 'auto'"
        )
    return float(damping) + float(weight_decay)


def _check_curvature(
    solver: str,
    store: str,
    store_dtype: str,
    memory_limit: float | None,
) -> None:
    _check_choice("solver", solver, ("auto", *SOLVERS))
    _check_choice("store", store, ("auto", *STORES))
    _check_choice("store_dtype", store_dtype, STORE_DTYPES)
    if memory_limit is not None and not memory_limit >= 1:
        raise ValueError(
            f"memory_limit={memory_limit}; expected a number of bytes, such as 10e9"
        )


def _check_update(scale_update: float, normalize_update: float | None) -> None:
    _real(scale_update=scale_update)
    if not abs(scale_update) < float("inf"):
        raise ValueError(
            f"scale_update={scale_update}; expected a number, 1 for the whole update "
            "and 0 for none"
        )
    if normalize_update is None:
        return
    is_number = isinstance(normalize_update, numbers.Real)
    if not is_number or not 0 < normalize_update < float("inf"):
        raise ValueError(
            f"normalize_update={normalize_update!r}; expected the largest norm of the "
            "update in norms of the weights, such as 1.0, or None"
        )


def _check_swaps(swaps: Any, update: str, pattern: Any, *others: Any) -> None:
    """The model loss of the joint update decides, and nothing but it."""
    if not isinstance(swaps, numbers.Integral) or swaps < 0:
        raise ValueError(f"swaps={swaps}; expected a number of rounds, 0 or more")
    if not swaps:
        return
    if update != "joint" or pattern is not None or others != ("global", None, 0.0):
        scope, flops_target, flops_power = others
        raise ValueError(
            f"swaps={swaps} with update={update!r}, pattern={pattern!r}, scope="
            f"{scope!r}, flops_target={flops_target} and flops_power={flops_power}; "
            "swaps follow the loss of the joint update alone: expected update='joint', "
            "scope='global' and none of the others"
        )


def _check_slope(
    update: str, centered: bool, mean_samples: Any, targets: Any, recompute: Any
) -> None:
    """The joint update takes its slope from the gradients of the Fisher."""
    if targets is not None and (centered or mean_samples is not None or recompute):
        raise ValueError(
            "targets are values for the rows of one Fisher; expected centered=False, "
            "mean_samples=None and recompute=0 with them"
        )
    if update == "joint" and (centered or mean_samples is not None):
        raise ValueError(
            "update='joint' of a method of first order takes the mean of the Fisher's "
            "own gradients; expected centered=False and mean_samples=None"
        )


def _recomputations(number: Any) -> int:
    if not isinstance(number, numbers.Integral) or number < 0:
        raise ValueError(
            f"recompute={number}; expected a whole number of recomputations, 0 or more"
        )
    return int(number)


def check_samples(
    settings: Settings, samples: Any, num_samples: int | None = None
) -> tuple[Settings, Any]:
    """Counts the samples and keeps what is needed of those that are read only once.

    Args:
        settings: The others.
        samples: As for :func:`woodfisher_jax.prune`.
        num_samples: N, or None for as many as there are.

    Returns:
        The settings with N, and the samples; None and 0 if the method needs none.

    Raises:
        ValueError: If there are too few.
    """
    if settings.method.curvature is not None:
        samples, count = counted(samples, num_samples, settings.batch_size)
        return settings._replace(num_samples=count), samples
    if not settings.counts_macs:
        return settings, None
    if samples is None:
        raise ValueError(
            "samples is missing; expected at least one example, since the "
            "multiply-accumulates are counted by tracing loss_fn with it"
        )
    return settings, next(regroup(samples, 1))
