"""What a run starts from: its config fitted, data and checkpoint read, the plan."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from woodfisher_jax import data, models
from woodfisher_jax.data import Progress
from woodfisher_jax.progress import silent
from woodfisher_jax.training import pruners
from woodfisher_jax.training.config import Config, ConfigError
from woodfisher_jax.training.fitting import fitted, narrowed
from woodfisher_jax.training.network.objective import axes_of, macs_per_weight, predict
from woodfisher_jax.training.plan import Plan, make_plan
from woodfisher_jax.training.resuming.saved_run import read_weights
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.state_dicts import num_outputs, to_variables

logger = logging.getLogger(__name__)


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
