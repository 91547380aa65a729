"""What a run is: frozen dataclasses with their defaults, checked once at the start.

A config file states only what differs from these defaults. A duration carries its unit
in its name, or in ``PruneConfig.unit``.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from woodfisher_jax.pruning.fisher import SOLVERS
from woodfisher_jax.pruning.methods import METHODS, method_named, scope_of
from woodfisher_jax.pruning.schedules import Stage, gradual, one_shot
from woodfisher_jax.pruning.settings import STORE_DTYPES, STORES

LR_SCHEDULES = ("constant", "step", "exponential", "cosine")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from.

    Attributes:
        name: A data set: digits, mnist or cifar10.
        dir: Folder of TFDS-prepared data; default the environment variable
            TFDS_DATA_DIR, or TFDS's own default.
        augment: Random crops and flips in training, where the data set has them.
    """

    name: str = "digits"
    dir: str | None = None
    augment: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: A row of ``woodfisher_jax.models.MODELS``.
        settings: Its keyword arguments; in a config file any further key of ``model``.
    """

    name: str = "mlp"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """SGD with momentum for a number of epochs.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Examples a step.
        learning_rate: At the start.
        momentum: Of SGD.
        weight_decay: On all parameters, added to the gradient.
        schedule: constant; step (times decay_rate at decay_start_epoch and each
            decay_every_epochs after); exponential (the same, smoothly, from
            decay_start_epoch); cosine (to 0 over all epochs).
        decay_rate: Factor of step and exponential.
        decay_start_epoch: First epoch at the lower rate (step), or where it starts.
        decay_every_epochs: Epochs between two factors.
        label_smoothing: Share of the target that is spread over all classes, [0, 1).
        weight_decay_after_pruning: Whether weight decay stays on after the last pruning
            step.
    """

    epochs: int = 0
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    decay_rate: float = 0.1
    decay_start_epoch: int = 1
    decay_every_epochs: int = 1
    label_smoothing: float = 0.0
    weight_decay_after_pruning: bool = True


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """When, how far and by which method to prune.

    Attributes:
        method: A row of ``woodfisher_jax.METHODS``.
        target_sparsity: Of the prunable weights at the end, [0, 1).
        initial_sparsity: At the first step; 0 leaves the step at ``start`` out.
        one_shot: Prune once, straight to the target, and do not retrain.
        unit: What start, end and frequency count: epochs or steps (of ``train``).
        start: Of the schedule.
        end: Of the schedule; the target is reached here.
        frequency: Time between pruning steps.
        degree: Exponent of the schedule; 3 is the paper's.
        num_samples: N, gradients in the Fisher.
        batch_size: m, examples each gradient is the mean over.
        microbatch_size: Most examples whose gradients a device forms at once; default
            64, or as many as fit.
        damping: λ on the Fisher's diagonal.
        block_size: c, weights a block; default whole tensors.
        scope: global or layer; default the method's own.
        scale_update: Factor on the update of the remaining weights; 0 for none.
        solver: auto, sample_space, dense or recursion.
        store: Where gradients wait between statistic and update: auto, device, host,
            disk or recompute.
        store_dtype: float32 or bfloat16.
        store_dir: Parent of the folder for gradients on disk; default the system's
            folder for temporary files.
        memory_limit_gb: Most memory for a pruning step to take, in 1e9 bytes; default
            what is free.
        prunable: Regular expression on parameter paths; default arrays of two or more
            dimensions.
        true_fisher: Draw the labels of Fisher samples from the model.
        augment: Augment the Fisher samples as in training.
    """

    method: str = "woodfisherblock"
    target_sparsity: float = 0.9
    initial_sparsity: float = 0.0
    one_shot: bool = False
    unit: str = "epochs"
    start: int = 0
    end: int = 0
    frequency: int = 1
    degree: float = 3.0
    num_samples: int = 100
    batch_size: int = 1
    microbatch_size: int | None = None
    damping: float = 1e-5
    block_size: int | None = None
    scope: str | None = None
    scale_update: float = 1.0
    solver: str = "auto"
    store: str = "auto"
    store_dtype: str = "float32"
    store_dir: str | None = None
    memory_limit_gb: float | None = None
    prunable: str | None = None
    true_fisher: bool = False
    augment: bool = False

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The pruning steps, in ``unit`` since the start of ``train``."""
        if self.one_shot:
            return one_shot(self.target_sparsity)
        return gradual(
            self.start,
            self.end,
            self.frequency,
            self.initial_sparsity,
            self.target_sparsity,
            self.degree,
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        seed: Of the initial weights, the order of examples and the Fisher samples.
        init_from: A PyTorch checkpoint (or .npz, .safetensors) of the dense network; it
            takes the place of training it.
        compare_with: Methods to run after the main one on the same schedule.
        checkpoint_every_epochs: Besides a checkpoint after every pruning step.
        eval_batch_size: Examples a step of evaluation.
        data: See :class:`DataConfig`.
        model: See :class:`ModelConfig`.
        dense: Training of the dense network, unless ``init_from`` is given.
        train: Training during and after pruning.
        prune: See :class:`PruneConfig`.
    """

    seed: int = 0
    init_from: str | None = None
    compare_with: tuple[str, ...] = ()
    checkpoint_every_epochs: int = 1
    eval_batch_size: int = 1000
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    dense: TrainConfig = TrainConfig()
    train: TrainConfig = TrainConfig()
    prune: PruneConfig = PruneConfig()


def field_types(section: type) -> dict[str, Any]:
    """The type of each field of a config dataclass."""
    return typing.get_type_hints(section)


def value_type(annotation: Any) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether None is allowed."""
    if isinstance(annotation, types.UnionType):
        plain = [part for part in typing.get_args(annotation) if part is not type(None)]
        return plain[0], True
    return typing.get_origin(annotation) or annotation, False


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values, as it is written to files."""
    values = dataclasses.asdict(config)
    model = values["model"]
    values["model"] = {"name": model["name"], **model["settings"]}
    values["compare_with"] = list(config.compare_with)
    return values


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a config from nested dicts; what is absent has its default.

    Args:
        values: As a config file gives them.

    Raises:
        ConfigError: If a key is unknown (with the nearest known one), a value has the
            wrong type or is out of range, or values contradict one another.
    """
    config = _section(Config, values, "config")
    try:
        _check(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.prune: {error}") from error
    return config


def check_key(key: str, known: typing.Iterable[str], where: str) -> None:
    """Raises with the nearest known key unless the key is known."""
    known = list(known)
    if key in known:
        return
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {where}.{close[0]}?" if close else f"; there are {known}"
    raise ConfigError(f"{where}.{key} does not exist{hint}")


def _section(section: type, values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={values!r}; expected a group of fields")
    if section is ModelConfig:
        rest = {key: value for key, value in values.items() if key != "name"}
        name = _value(str, values.get("name", ModelConfig.name), f"{where}.name")
        return ModelConfig(name, {k: _plain(v) for k, v in rest.items()})
    hints = field_types(section)
    fields = {}
    for key, value in values.items():
        check_key(key, hints, where)
        annotation = hints[key]
        if dataclasses.is_dataclass(annotation):
            assert isinstance(annotation, type)
            fields[key] = _section(annotation, value, f"{where}.{key}")
        else:
            fields[key] = _value(annotation, value, f"{where}.{key}")
    return section(**fields)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _value(annotation: Any, value: Any, where: str) -> Any:
    expected, optional = value_type(annotation)
    if value is None and optional:
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if type(value) is not expected:
        what = f"{expected.__name__}{' or None' if optional else ''}"
        raise ConfigError(
            f"{where}={value!r} is of type {type(value).__name__}; expected {what}"
        )
    return value


def _require(condition: bool, where: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"config.{where}={value!r}; expected {expected}")


def _check(config: Config) -> None:
    _require(config.seed >= 0, "seed", config.seed, "0 or more")
    for name in ("checkpoint_every_epochs", "eval_batch_size"):
        value = getattr(config, name)
        _require(value >= 1, name, value, "1 or more")
    for method in config.compare_with:
        method_named(method)
    _check_train(config.dense, "dense")
    _check_train(config.train, "train")
    _check_prune(config.prune)
    stages, prune = config.prune.stages, config.prune
    if prune.unit == "epochs" and not prune.one_shot and stages:
        _require(
            stages[-1].time <= config.train.epochs,
            "prune.end",
            prune.end,
            f"at most train.epochs={config.train.epochs}",
        )


def _check_train(train: TrainConfig, name: str) -> None:
    _require(train.epochs >= 0, f"{name}.epochs", train.epochs, "0 or more")
    for field in ("batch_size", "decay_every_epochs"):
        value = getattr(train, field)
        _require(value >= 1, f"{name}.{field}", value, "1 or more")
    for field in ("learning_rate", "decay_rate"):
        value = getattr(train, field)
        _require(value > 0, f"{name}.{field}", value, "a positive number")
    _require(
        train.schedule in LR_SCHEDULES,
        f"{name}.schedule",
        train.schedule,
        f"one of {list(LR_SCHEDULES)}",
    )
    for field in ("momentum", "label_smoothing"):
        value = getattr(train, field)
        _require(0 <= value < 1, f"{name}.{field}", value, "a number in [0, 1)")
    for field in ("weight_decay", "decay_start_epoch"):
        value = getattr(train, field)
        _require(value >= 0, f"{name}.{field}", value, "0 or more")


def _check_prune(prune: PruneConfig) -> None:
    _require(
        prune.method in METHODS, "prune.method", prune.method, f"one of {list(METHODS)}"
    )
    scope_of(prune.method, prune.scope)
    for field in ("target_sparsity", "initial_sparsity"):
        value = getattr(prune, field)
        _require(
            0 <= value < 1, f"prune.{field}", value, "a fraction in [0, 1), such as 0.9"
        )
    _require(
        prune.initial_sparsity <= prune.target_sparsity,
        "prune.target_sparsity",
        prune.target_sparsity,
        f"at least initial_sparsity={prune.initial_sparsity}",
    )
    _require(
        prune.unit in ("epochs", "steps"), "prune.unit", prune.unit, "epochs or steps"
    )
    for field in ("num_samples", "batch_size", "microbatch_size", "block_size"):
        value = getattr(prune, field)
        _require(value is None or value >= 1, f"prune.{field}", value, "1 or more")
    _require(
        0 < prune.damping < float("inf"),
        "prune.damping",
        prune.damping,
        "a positive number, such as 1e-5",
    )
    for field, choices in (
        ("solver", ["auto", *SOLVERS]),
        ("store", ["auto", *STORES]),
        ("store_dtype", list(STORE_DTYPES)),
    ):
        value = getattr(prune, field)
        _require(value in choices, f"prune.{field}", value, f"one of {choices}")
    _require(
        prune.memory_limit_gb is None or prune.memory_limit_gb > 0,
        "prune.memory_limit_gb",
        prune.memory_limit_gb,
        "a positive number, such as 10",
    )
