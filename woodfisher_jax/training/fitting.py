"""A config adapted to its data: classes, numbers of examples; widths of a network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from woodfisher_jax import models
from woodfisher_jax.data import DataSet
from woodfisher_jax.rows.sharding import num_devices
from woodfisher_jax.training import distributed
from woodfisher_jax.training.config import Config, PruneConfig, TrainConfig


def fitted(config: Config, dataset: DataSet) -> tuple[Config, list[str]]:
    """Takes classes from a data set, and no more examples than it has.

    Args:
        config: Of the run; what fits stays as it is.
        dataset: Its data set.

    Returns:
        The config, and a line for each value that has changed. Of a pruner with too
        many examples first the batch size is lowered, then the number of gradients.
    """
    total = dataset.num_train
    model = config.model
    notes = []
    if "num_classes" not in model.settings:
        settings = {**model.settings, "num_classes": dataset.num_classes}
        model = dataclasses.replace(model, settings=settings)
        notes.append(f"config.model.num_classes={dataset.num_classes}, of the data set")
    limits = {
        "dense": _batch(config.dense, total),
        "train": _batch(config.train, total),
    }
    limits |= {name: _samples(one, total) for name, one in config.pruners.items()}
    sections: dict[str, Any] = {"dense": config.dense, "train": config.train}
    sections |= config.pruners
    for name, limit in limits.items():
        section = sections[name]
        for field, most in limit.items():
            value = _value(section, field)
            if value is None or value <= most:
                continue
            notes.append(
                f"config.{name}.{field}={most} instead of {value}: there are {total} "
                "training examples"
            )
            section = _replaced(section, field, most)
        sections[name] = section
    dense, train, prune, *others = sections.values()
    return (
        dataclasses.replace(
            config,
            model=model,
            dense=dense,
            train=train,
            prune=prune,
            also_prune=tuple(others),
        ),
        notes,
    )


def narrowed(
    config: Config,
    model: nn.Module,
    variables: Any,
    found: Mapping[str, int],
    image: Any,
) -> tuple[Config, list[str]]:
    """Takes widths of layers from a network from which structure was taken out.

    Args:
        config: Of the run.
        model: That it describes.
        variables: Of the model, or their shapes.
        found: Outputs of layers of the network, by path.
        image: That the model is called with, or its shape.

    Returns:
        The config with ``model.widths`` of the layers with fewer outputs than it says;
        and a line that says so, if there are any.

    Raises:
        ValueError: If an attention layer has part of a head.
    """
    usual = models.layer_outputs(variables)
    if all(found.get(layer, n) >= n for layer, n in usual.items()):
        return config, []
    small: Any = models.narrowed(model, found, image)
    if small is model:
        return config, []
    widths = dict(small.widths)
    settings = {**config.model.settings, "widths": widths}
    section = dataclasses.replace(config.model, settings=settings)
    fewer = [f"{k} {n} of {usual[k]}" for k, n in widths.items() if n < usual[k]]
    more = f" and {len(fewer) - 3} more" if fewer[3:] else ""
    return dataclasses.replace(config, model=section), [
        "config.model.widths, outputs of layers that config.init_from has of "
        f"{config.model.name}: {', '.join(fewer[:3])}{more}"
    ]


def _batch(settings: TrainConfig, total: int) -> dict[str, int]:
    """The largest batch: a multiple of what the devices share."""
    mesh = distributed.all_devices()
    parts = num_devices(mesh) * settings.accumulation_steps
    return {"batch_size": max(parts, total // parts * parts)}


def _samples(pruner: PruneConfig, total: int) -> dict[str, int]:
    """The largest numbers of examples of a pruner."""
    held_out = min(pruner.damping_search_samples, total // 2)
    room = total - held_out
    return {
        "damping_search_samples": held_out,
        "num_samples": room,
        "batch_size": max(1, room // pruner.num_samples),
        "mean_samples": room,
        "batch_norm_samples": total,
        "loss_samples": total,
    }


def _value(section: Any, field: str) -> Any:
    if isinstance(section, PruneConfig) and field == "batch_size":
        return section.value_of(field)
    return getattr(section, field)


def _replaced(section: Any, field: str, value: int) -> Any:
    if isinstance(section, PruneConfig) and field == "batch_size":
        return dataclasses.replace(section, options={**section.options, field: value})
    return dataclasses.replace(section, **{field: value})
