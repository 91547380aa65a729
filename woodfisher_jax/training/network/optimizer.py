"""Optimizers and learning rates of Optax by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from woodfisher_jax.options import LARGEST, OptionError, check_known, shown
from woodfisher_jax.trees.paths import Params

OPTIMIZERS = (
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "lamb",
    "lars",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "radam",
    "rmsprop",
    "sgd",
    "yogi",
)
"""Functions of Optax; their keyword arguments are the settings."""

DEFAULTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
"""Settings that are not Optax's own defaults."""

SHARES = ("momentum", "b1", "b2", "decay")
"""Settings in [0, 1)."""

# Given by the run, or no plain value.
_NO_SETTINGS = {"learning_rate", "weight_decay", "mask", "weight_decay_mask"}

LR_SCHEDULES = (
    "constant",
    "step",
    "multistep",
    "exponential",
    "linear",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "one_cycle",
)


def learning_rate(
    name: str,
    initial: float,
    *,
    steps_per_epoch: int,
    epochs: int,
    final: float = 0.0,
    decay_rate: float = 0.1,
    decay_start_epoch: int = 1,
    decay_every_epochs: int = 1,
    decay_end_epoch: int | None = None,
    decay_at_epochs: Sequence[int] = (),
) -> optax.Schedule:
    """A learning-rate schedule over optimizer steps.

    Args:
        name: One of :data:`LR_SCHEDULES`.
        initial: Learning rate of the first step; the highest one of one_cycle.
        steps_per_epoch: Optimizer steps an epoch.
        epochs: Length of the whole schedule.
        final: Where linear and cosine end, and the lowest of cosine_restarts and
            cyclic; default 0.
        decay_rate: Factor of step, multistep and exponential.
        decay_start_epoch: Step: the first epoch at a lower rate. Exponential: where the
            decay begins.
        decay_every_epochs: Epochs between two factors, or the period of
            cosine_restarts and cyclic.
        decay_end_epoch: Step: the last epoch that may begin with a factor.
            Exponential: where the decay ends. Default none.
        decay_at_epochs: Multistep: the epochs that begin with a factor.

    Returns:
        Step number to learning rate.

    Raises:
        ValueError: If there is no schedule of that name.
    """
    length = max(1, epochs * steps_per_epoch)
    period = decay_every_epochs * steps_per_epoch
    if name == "constant":
        return optax.constant_schedule(initial)
    if name in ("step", "multistep"):
        last = epochs - 1 if decay_end_epoch is None else decay_end_epoch
        drops = (
            decay_at_epochs
            if name == "multistep"
            else range(decay_start_epoch, last + 1, decay_every_epochs)
        )
        return optax.piecewise_constant_schedule(
            initial, {epoch * steps_per_epoch: decay_rate for epoch in drops}
        )
    if name == "exponential":
        begin, end = decay_start_epoch * steps_per_epoch, None
        if decay_end_epoch is not None:
            left = max(0, decay_end_epoch - decay_start_epoch) / decay_every_epochs
            end = initial * decay_rate**left
        return optax.exponential_decay(
            initial, period, decay_rate, transition_begin=begin, end_value=end
        )
    if name == "linear":
        return optax.linear_schedule(initial, final, length)
    if name == "cosine":
        return optax.cosine_decay_schedule(initial, length, final / initial)
    if name == "cosine_restarts":
        wave = optax.cosine_decay_schedule(initial, period, final / initial)
        return lambda step: wave(step % period)
    if name == "cyclic":
        half = period / 2
        down = optax.linear_schedule(initial, final, half)
        return lambda step: down(jnp.abs(step % period - half))
    if name == "one_cycle":
        return optax.cosine_onecycle_schedule(length, initial)
    raise ValueError(f"schedule={name!r}; expected one of {list(LR_SCHEDULES)}")


def warm_up(schedule: optax.Schedule, num_steps: int) -> optax.Schedule:
    """A schedule that starts low: ``schedule(t) · min(1, (t + 1) / n)``.

    Goyal et al. 2017, arXiv:1706.02677, section 2.2.

    Args:
        schedule: Step to learning rate.
        num_steps: n, of the warm-up; 0 leaves the schedule as it is.
    """
    if not num_steps:
        return schedule
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / num_steps)


def kernels(params: Params) -> Any:
    """Which parameters are kernels, as a pytree of bool."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: jax.tree_util.keystr(keys[-1:], simple=True) == "kernel", params
    )


def optimizer_settings(name: str) -> tuple[str, ...]:
    """The settings that an optimizer takes besides learning rate and weight decay.

    Args:
        name: One of :data:`OPTIMIZERS`.

    Raises:
        OptionError: If there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        message = f"name={name!r}; expected one of {list(OPTIMIZERS)}"
        raise OptionError("name", message)
    parameters = inspect.signature(getattr(optax, name)).parameters
    return tuple(key for key in parameters if key not in _NO_SETTINGS)


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raises unless an optimizer takes the settings.

    Raises:
        OptionError: Naming the setting, and those that there are.
    """
    known = optimizer_settings(name)
    parameters = inspect.signature(getattr(optax, name)).parameters
    for key, value in settings.items():
        check_known(key, known, name)
        default = parameters[key].default
        if isinstance(default, bool):
            fits, expected = isinstance(value, bool), "True or False"
        elif key.endswith("dtype"):
            fits = value is None or value in ("float32", "bfloat16", "float16")
            expected = "'float32', 'bfloat16', 'float16' or None"
        elif key in SHARES:
            fits = value is None or (_is_finite(value) and 0 <= value < 1)
            expected = "a number in [0, 1)"
        else:
            fits = value is None or _is_finite(value)
            expected = "a finite number or None"
        if not fits:
            raise OptionError(key, f"{key}={shown(value)}; expected {expected}")


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    settings: Mapping[str, Any] | None = None,
    kernels_only: bool = False,
) -> optax.GradientTransformation:
    """Builds an optimizer of Optax.

    Weight decay is what the optimizer itself makes of it (decoupled in adamw, lamb,
    lion and others); where it knows none (sgd, adam, rmsprop), ``weight_decay · w`` is
    added to the gradient, as in PyTorch. The shape of the state does not depend on it.

    Args:
        name: One of :data:`OPTIMIZERS`.
        schedule: Step to learning rate.
        weight_decay: Factor on the weights; default 0.
        settings: Further keyword arguments of the function in Optax, as
            :func:`check_settings` takes them. Default those of Optax, and a momentum
            of 0.9 for sgd.
        kernels_only: Whether weight decay leaves out what is not called ``kernel``:
            biases, scales of norms, embeddings. Default False.

    Raises:
        ValueError: If the optimizer cannot leave weights out of its weight decay.
    """
    settings = {**DEFAULTS.get(name, {}), **(settings or {})}
    build: Callable[..., optax.GradientTransformation] = getattr(optax, name)
    takes = inspect.signature(build).parameters
    mask = kernels if kernels_only else None
    if "weight_decay" in takes:
        # lars has a mask for its own scaling beside that for weight decay.
        which = next((k for k in ("weight_decay_mask", "mask") if k in takes), None)
        if mask and which:
            settings[which] = mask
        elif mask:
            raise ValueError(
                f"kernels_only: {name} decays all weights or none; use adamw or sgd"
            )
        return build(schedule, weight_decay=weight_decay, **settings)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask), build(schedule, **settings)
    )
