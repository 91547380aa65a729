"""The plan of a run: phases of training and pruning steps, over global steps."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import optax
from jax.sharding import Mesh

from woodfisher_jax import data
from woodfisher_jax.data import Progress, batches
from woodfisher_jax.rows.sharding import num_devices
from woodfisher_jax.training import distributed
from woodfisher_jax.training.config import Config, ConfigError, PruneConfig, TrainConfig
from woodfisher_jax.training.network import optimizer
from woodfisher_jax.trees.axes import Axes


class Phase(NamedTuple):
    """Training with one optimizer: of the dense network, or with pruning.

    Attributes:
        settings: Its section of the config.
        first_step: Global step where it starts.
        steps_per_epoch: Optimizer steps an epoch.
        first_epoch: Global epoch where it starts.
        schedule: Learning rate over its own steps.
        tx: The optimizer.
        tx_no_decay: The same without weight decay, with the same state.
        model: The Linen module, in the precision of this training.
    """

    settings: TrainConfig
    first_step: int
    steps_per_epoch: int
    first_epoch: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    tx_no_decay: optax.GradientTransformation
    model: nn.Module

    @property
    def last_step(self) -> int:
        """Global step where it ends."""
        return self.first_step + self.settings.epochs * self.steps_per_epoch

    def epoch_at(self, step: int) -> float:
        """Epochs done at a global step, counted over both phases."""
        done = (step - self.first_step) / self.steps_per_epoch
        return round(self.first_epoch + done, 4)


class Stage(NamedTuple):
    """One pruning step of a run.

    Attributes:
        time: Global step at which it is due.
        sparsity: Of the weights of its pruner, after it.
        pruner: The section of the config: prune, prune_2, ...
    """

    time: int
    sparsity: float
    pruner: str


class Plan(NamedTuple):
    """The constants of a run.

    Attributes:
        config: The run's config.
        dataset: Both splits.
        model: The Linen module, in float32.
        dense: Training of the dense network (no epochs if it was given).
        train: Training from the first pruning step on.
        stages: Pruning steps in order of time.
        progress: Called with (label, done, total).
        mesh: The devices of all processes, or None for one.
        costs: Multiply-accumulates of a weight of each layer, or None where the model
            cannot be counted.
    """

    config: Config
    dataset: data.DataSet
    model: nn.Module
    dense: Phase
    train: Phase
    stages: tuple[Stage, ...]
    progress: Progress
    mesh: Mesh | None = None
    costs: Mapping[str, float] | None = None
    axes: Axes | None = None

    @property
    def end(self) -> int:
        """Global step where training ends."""
        return self.train.last_step


def make_plan(
    config: Config,
    dataset: data.DataSet,
    model: nn.Module,
    progress: Progress,
    *,
    trained: bool = True,
    mesh: Mesh | None = None,
) -> Plan:
    """Lays the phases and the pruning steps out over global steps.

    Args:
        config: Of the run.
        dataset: Both splits.
        model: The Linen module.
        progress: Called with (label, done, total).
        trained: Whether a network of ``init_from`` needs no training before pruning.
        mesh: Of the run; default all devices of all processes.

    Raises:
        ConfigError: If a batch or the Fisher samples exceed the training set, or the
            devices do not divide a batch.
    """
    available = dataset.num_train
    mesh = mesh or distributed.all_devices()
    for name, pruner in config.pruners.items():
        _check_samples(name, pruner, dataset)
    for name, settings in (("dense", config.dense), ("train", config.train)):
        if settings.batch_size > available:
            raise ConfigError(
                f"config.{name}.batch_size={settings.batch_size}; expected at most the "
                f"{available} training examples of {dataset.name}"
            )
        _check_shares(name, settings, num_devices(mesh))
    given = dataclasses.replace(config.dense, epochs=0)
    dense = make_phase(
        given if config.init_from and trained else config.dense,
        dataset,
        model,
        first_step=0,
        first_epoch=0,
    )
    once = dataclasses.replace(config.train, epochs=0)
    train = make_phase(
        once if config.prune.one_shot else config.train,
        dataset,
        model,
        first_step=dense.last_step,
        first_epoch=dense.settings.epochs,
    )
    stages = [
        stage
        for name, pruner in config.pruners.items()
        for stage in _stages(name, pruner, train)
    ]
    # Sorting keeps the order of the pruners where they share a time.
    stages.sort(key=lambda stage: stage.time)
    return Plan(config, dataset, model, dense, train, tuple(stages), progress, mesh)


def _check_shares(name: str, settings: TrainConfig, devices: int) -> None:
    """Every device has as many examples of each part of a batch as any other."""
    parts = devices * settings.accumulation_steps
    if settings.epochs and settings.batch_size % parts:
        down = settings.batch_size // parts * parts
        raise ConfigError(
            f"config.{name}.batch_size={settings.batch_size}; expected a multiple of "
            f"{parts}, devices x accumulation_steps = {devices} x "
            f"{settings.accumulation_steps}, such as {down or parts} or {down + parts}"
        )


def _check_samples(name: str, pruner: PruneConfig, dataset: data.DataSet) -> None:
    """The training set has the examples that a pruner takes."""
    available, needed = dataset.num_train, pruner.num_examples
    if needed > available:
        raise ConfigError(
            f"config.{name}: num_samples x batch_size = {pruner.num_samples} x "
            f"{pruner.value_of('batch_size')} = {needed} examples, but the training "
            f"set of {dataset.name} has {available}; lower one of the two"
        )
    held_out = pruner.damping_search_samples
    used = max(needed, pruner.mean_samples or 0)
    if held_out and used + held_out > available:
        raise ConfigError(
            f"config.{name}.damping_search_samples={held_out} beside {used} "
            f"examples of the gradients; expected no more than the {available} "
            f"training examples of {dataset.name} together"
        )
    for field in ("mean_samples", "batch_norm_samples", "loss_samples"):
        number = getattr(pruner, field)
        if number is not None and number > available:
            raise ConfigError(
                f"config.{name}.{field}={number}; expected at most the {available} "
                f"training examples of {dataset.name}"
            )


def _stages(name: str, pruner: PruneConfig, train: Phase) -> list[Stage]:
    """The steps of one pruner over global steps."""
    unit = train.steps_per_epoch if pruner.unit == "epochs" else 1
    stages = [
        Stage(train.first_step + time * unit, sparsity, name)
        for time, sparsity in pruner.stages
    ]
    if stages and stages[-1].time > train.last_step:
        raise ConfigError(
            f"config.{name}.end={pruner.end} steps; expected at most the "
            f"{train.last_step - train.first_step} steps of config.train"
        )
    return stages


def make_phase(
    settings: TrainConfig,
    dataset: data.DataSet,
    model: nn.Module,
    *,
    first_step: int,
    first_epoch: int,
) -> Phase:
    """Builds the optimizer of a phase, and the model in its precision.

    Raises:
        ConfigError: If the optimizer or the model cannot do what the settings ask for.
    """
    steps_per_epoch = batches.steps_per_epoch(dataset, settings.batch_size)
    schedule = optimizer.learning_rate(
        settings.schedule,
        settings.learning_rate,
        steps_per_epoch=steps_per_epoch,
        epochs=settings.epochs,
        final=settings.final_learning_rate,
        decay_rate=settings.decay_rate,
        decay_start_epoch=settings.decay_start_epoch,
        decay_every_epochs=settings.decay_every_epochs,
        decay_end_epoch=settings.decay_end_epoch,
        decay_at_epochs=settings.decay_at_epochs,
    )
    schedule = optimizer.warm_up(schedule, settings.warmup_epochs * steps_per_epoch)
    try:
        tx, tx_no_decay = (
            optimizer.make_optimizer(
                settings.optimizer.name,
                schedule,
                weight_decay,
                settings.optimizer.settings,
                settings.weight_decay_kernels_only,
            )
            for weight_decay in (settings.weight_decay, 0.0)
        )
    except ValueError as error:
        raise ConfigError(f"config: optimizer: {error}") from error
    if settings.dtype != "float32":
        if not hasattr(model, "dtype"):
            raise ConfigError(
                f"dtype={settings.dtype!r}, but {type(model).__name__} computes in "
                "float32 only; expected dtype='float32'"
            )
        model = model.clone(dtype=settings.dtype)
    return Phase(
        settings,
        first_step,
        steps_per_epoch,
        first_epoch,
        schedule,
        tx,
        tx_no_decay,
        model,
    )
