"""A config made into a plan: data, model, phases of training, pruning steps."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from woodfisher_jax import data, models
from woodfisher_jax.data import Progress, batches
from woodfisher_jax.progress import silent
from woodfisher_jax.rows.sharding import num_devices
from woodfisher_jax.training import distributed, optimizer, pruners
from woodfisher_jax.training.config import Config, ConfigError, PruneConfig, TrainConfig
from woodfisher_jax.training.fitting import fitted, narrowed
from woodfisher_jax.training.objective import axes_of, macs_per_weight, predict
from woodfisher_jax.training.saved_run import read_weights
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.state_dicts import num_outputs, to_variables

logger = logging.getLogger(__name__)


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


def fit(config: Config) -> tuple[Config, list[str]]:
    """Adapts a config to a smaller network in ``init_from``, and to its data set.

    Returns:
        The config, and a line for each value that has changed. The data set counts if
        the config says ``fit_to_data``.

    Raises:
        ConfigError: If the network cannot be built, or its weights cannot be read.
    """
    notes: list[str] = []
    if config.fit_to_data:
        config, notes = fitted(config, _data(config, silent))
    if config.init_from is None:
        return config, notes
    with _refused_as("config.init_from"):
        state_dict = read_weights(config.init_from)
    with _refused_as("config.data"):
        shape = data.stand_in(config.data.name, 1, config.data).image_shape
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    with _refused_as("config.model", Exception):
        model = models.build_model(config.model.name, **config.model.settings)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    with _refused_as(f"config.init_from={config.init_from} as {config.model.name}"):
        found = num_outputs(state_dict, shapes)
        config, more = narrowed(config, model, shapes, found, image)
    return config, notes + more


def prepare(config: Config, progress: Progress) -> tuple[Plan, tuple[Any, Masks]]:
    """Reads the checkpoint and the data, builds the model and the phases.

    Args:
        config: As `fit` returns it.
        progress: Called with (label, done, total).

    Returns:
        The plan, and the variables and masks to start from.
    """
    with _refused_as("config.model", Exception):
        model = models.build_model(config.model.name, **config.model.settings)
    with _refused_as("config.init_from"):
        state_dict = read_weights(config.init_from) if config.init_from else None
    dataset = _data(config, progress)
    if dataset.split_off:
        logger.info(
            "%s has no folder of test images: %d of %d images are held out, drawn "
            "class by class",
            dataset.name,
            dataset.test.size,
            dataset.test.size + dataset.num_train,
        )
    image = np.zeros((1, *dataset.image_shape), np.float32)
    with _refused_as("config.model", Exception):  # Any, of any settings.
        variables = jax.jit(model.init)(jax.random.key(config.seed), image)
        models.check_widths(config.model.settings.get("widths", {}), variables)
    _check_classes(config, dataset, model, variables)
    saved: dict[str, np.ndarray] = {}
    own: list[str] = []
    if state_dict is not None:
        with _refused_as(f"config.init_from={config.init_from} as {config.model.name}"):
            own, what = _new_classifier(config, state_dict, variables, image)
            variables, saved = to_variables(state_dict, variables, own)
        if own:
            logger.warning(what)
    plan = make_plan(config, dataset, model, progress, trained=not own)
    axes = axes_of(model, variables, dataset.image_shape)
    selected = pruners.init_masks(variables["params"], config, axes)
    masks = {path: jnp.asarray(saved.get(path, m)) for path, m in selected.items()}
    variables = jax.tree.map(jnp.asarray, variables)
    for name, pruner in config.pruners.items():
        if pruner.batch_norm_samples and "batch_stats" not in variables:
            raise ConfigError(
                f"config.{name}.batch_norm_samples={pruner.batch_norm_samples}, but "
                f"{config.model.name} has no batch norm; expected 0"
            )
    try:
        costs = macs_per_weight(model, variables, dataset.image_shape)
    except ValueError as error:
        logger.warning("multiply-accumulates are not reported: %s", error)
        costs = None
    return plan._replace(costs=costs, axes=axes), (variables, masks)


def outline(config: Config, mesh: Mesh) -> tuple[Plan, tuple[Any, Any]]:
    """The plan of a run on devices that need not be there, without data or weights.

    Args:
        config: Of the run.
        mesh: The devices, one or more.

    Returns:
        The plan, and the shapes of the variables to start from, with masks that keep
        everything.

    Raises:
        ConfigError: If it cannot be run, or takes its number of classes from the data.
    """
    if config.fit_to_data:
        raise ConfigError(
            "config.fit_to_data=True takes values from the data, which are not read "
            "for a target; expected False, with config.model.num_classes"
        )
    with _refused_as("config.model", Exception):
        model = models.build_model(config.model.name, **config.model.settings)
    with _refused_as("config.data"):
        dataset = data.stand_in(config.data.name, 1, config.data)
    image = np.zeros((1, *dataset.image_shape), np.float32)
    with _refused_as("config.model", Exception):
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        models.check_widths(config.model.settings.get("widths", {}), variables)
        logits = jax.eval_shape(functools.partial(predict, model), variables, image)
    dataset = dataset._replace(num_classes=logits.shape[-1])
    plan = make_plan(config, dataset, model, silent, mesh=mesh)
    axes = axes_of(model, variables, dataset.image_shape)
    shapes = jax.eval_shape(
        lambda params: pruners.init_masks(params, config, axes), variables["params"]
    )
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in shapes.items()}
    return plan._replace(axes=axes), (variables, masks)


def _data(config: Config, progress: Progress) -> data.DataSet:
    with _refused_as("config.data"):
        return data.load(
            config.data.name,
            data_dir=config.data.dir,
            progress=progress,
            options=config.data,
        )


def _new_classifier(
    config: Config, state_dict: Mapping[str, np.ndarray], variables: Any, image: Any
) -> tuple[list[str], str]:
    """The classifier, where a state dict has another number of outputs.

    Returns:
        Its paths, none where it fits; and a sentence that says so.
    """
    if not config.fit_to_data:
        return [], ""
    present = leaves_by_path(variables)
    settings = dict(config.model.settings)
    settings["num_classes"] += 1
    larger = leaves_by_path(
        jax.eval_shape(
            models.build_model(config.model.name, **settings).init,
            jax.random.key(0),
            image,
        )
    )
    paths = [path for path in present if present[path].shape != larger[path].shape]
    (kernel,) = (path for path in paths if path.endswith("kernel"))
    layer = kernel.removeprefix("params/").removesuffix("/kernel")
    outputs = num_outputs(state_dict, variables).get(layer)
    classes = present[kernel].shape[-1]
    if outputs == classes:
        return [], ""
    return paths, (
        f"{kernel.split('/')[-2]} of config.init_from has "
        f"{'no weights' if outputs is None else f'{outputs} outputs'}, and the data "
        f"{classes} classes: it starts from random weights, and the network is trained "
        f"for config.dense.epochs={config.dense.epochs} before pruning"
    )


@contextlib.contextmanager
def _refused_as(field: str, *others: type[Exception]) -> Iterator[None]:
    """Errors get the name of the field that they come from.

    Args:
        field: Its name.
        *others: Further kinds of errors than a wrong value, type or file.
    """
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, *others)
    try:
        yield
    except data.DataMissingError:
        raise  # It says where to get the data; the config is right.
    except kinds as error:
        raise ConfigError(f"{field}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error as one line, with its kind where that says more than its words."""
    line = str(error).partition("\n")[0]
    if isinstance(error, (ValueError, TypeError, OSError)) and line:
        return line
    return f"{type(error).__name__}: {line:.300}"


def _check_classes(
    config: Config, dataset: data.DataSet, model: nn.Module, variables: Any
) -> None:
    """The model has as many outputs as the data set has classes."""
    image = np.zeros((1, *dataset.image_shape), np.float32)
    logits = jax.eval_shape(functools.partial(predict, model), variables, image)
    found = logits.shape[-1]
    if found != dataset.num_classes:
        raise ConfigError(
            f"config.model.name={config.model.name!r} has {found} classes; expected "
            f"the {dataset.num_classes} of {dataset.name}: set "
            "config.model.num_classes to it, or leave it out with "
            "config.fit_to_data=True"
        )


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
