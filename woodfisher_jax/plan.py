"""A config made into a plan: data, model, phases of training, pruning steps."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from woodfisher_jax import data, models, optimizer, torch_weights
from woodfisher_jax.config import Config, ConfigError, TrainConfig
from woodfisher_jax.data import Progress, batches
from woodfisher_jax.pruning import masks as masks_
from woodfisher_jax.pruning.masks import Masks
from woodfisher_jax.pruning.schedules import Stage


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
    """

    settings: TrainConfig
    first_step: int
    steps_per_epoch: int
    first_epoch: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    tx_no_decay: optax.GradientTransformation

    @property
    def last_step(self) -> int:
        """Global step where it ends."""
        return self.first_step + self.settings.epochs * self.steps_per_epoch

    def epoch_at(self, step: int) -> float:
        """Epochs done at a global step, counted over both phases."""
        done = (step - self.first_step) / self.steps_per_epoch
        return round(self.first_epoch + done, 4)


class Plan(NamedTuple):
    """All that a run needs and does not change.

    Attributes:
        config: The run's config.
        dataset: Both splits, in memory.
        model: The Linen module.
        dense: Training of the dense network (no epochs if it was given).
        train: Training from the first pruning step on.
        stages: Pruning steps; ``time`` is the global step.
        progress: Called with (label, done, total).
    """

    config: Config
    dataset: data.DataSet
    model: nn.Module
    dense: Phase
    train: Phase
    stages: tuple[Stage, ...]
    progress: Progress

    @property
    def end(self) -> int:
        """Global step where training ends."""
        return self.train.last_step


def prepare(config: Config, progress: Progress) -> tuple[Plan, tuple[Any, Masks]]:
    """Reads the checkpoint and the data, builds the model and the phases.

    Returns:
        The plan, and the variables and masks to start from.
    """
    try:
        model = models.build_model(config.model.name, **config.model.settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.model: {error}") from error
    state_dict = (
        torch_weights.read_state_dict(config.init_from) if config.init_from else None
    )
    dataset = data.load(config.data.name, data_dir=config.data.dir, progress=progress)
    image = np.zeros((1, *dataset.train.images.shape[1:]), np.float32)
    variables = jax.jit(model.init)(jax.random.key(config.seed), image)
    saved: dict[str, np.ndarray] = {}
    if state_dict is not None:
        variables, saved = torch_weights.to_variables(state_dict, variables)
    plan = make_plan(config, dataset, model, progress)
    selected = masks_.init_masks(variables["params"], config.prune.prunable)
    masks = {path: jnp.asarray(saved.get(path, m)) for path, m in selected.items()}
    return plan, (jax.tree.map(jnp.asarray, variables), masks)


def make_plan(
    config: Config, dataset: data.DataSet, model: nn.Module, progress: Progress
) -> Plan:
    """Lays the phases and the pruning steps out over global steps.

    Raises:
        ConfigError: If a batch or the Fisher samples exceed the training set.
    """
    pruning = config.prune
    needed = pruning.num_samples * pruning.batch_size
    available = len(dataset.train.labels)
    if needed > available:
        raise ConfigError(
            f"config.prune: num_samples x batch_size = {pruning.num_samples} x "
            f"{pruning.batch_size} = {needed} examples, but the training set of "
            f"{dataset.name} has {available}; lower one of the two"
        )
    for name, settings in (("dense", config.dense), ("train", config.train)):
        if settings.batch_size > available:
            raise ConfigError(
                f"config.{name}.batch_size={settings.batch_size}; expected at most the "
                f"{available} training examples of {dataset.name}"
            )
    given = dataclasses.replace(config.dense, epochs=0)
    dense = make_phase(
        given if config.init_from else config.dense,
        dataset,
        first_step=0,
        first_epoch=0,
    )
    once = dataclasses.replace(config.train, epochs=0)
    train = make_phase(
        once if pruning.one_shot else config.train,
        dataset,
        first_step=dense.last_step,
        first_epoch=dense.settings.epochs,
    )
    unit = train.steps_per_epoch if pruning.unit == "epochs" else 1
    stages = tuple(
        Stage(train.first_step + stage.time * unit, stage.sparsity)
        for stage in pruning.stages
    )
    if stages and stages[-1].time > train.last_step:
        raise ConfigError(
            f"config.prune.end={pruning.end} steps; expected at most the "
            f"{train.last_step - train.first_step} steps of config.train"
        )
    return Plan(config, dataset, model, dense, train, stages, progress)


def make_phase(
    settings: TrainConfig, dataset: data.DataSet, *, first_step: int, first_epoch: int
) -> Phase:
    """Builds the optimizer of a phase."""
    steps_per_epoch = batches.steps_per_epoch(dataset, settings.batch_size)
    schedule = optimizer.learning_rate(
        settings.schedule,
        settings.learning_rate,
        steps_per_epoch=steps_per_epoch,
        epochs=settings.epochs,
        decay_rate=settings.decay_rate,
        decay_start_epoch=settings.decay_start_epoch,
        decay_every_epochs=settings.decay_every_epochs,
    )
    return Phase(
        settings,
        first_step,
        steps_per_epoch,
        first_epoch,
        schedule,
        optimizer.sgd(schedule, settings.momentum, settings.weight_decay),
        optimizer.sgd(schedule, settings.momentum, 0.0),
    )
