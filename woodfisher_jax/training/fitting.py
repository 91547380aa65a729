"""A config adapted to its data set: its classes, and as many examples as it has."""

import dataclasses
from typing import Any

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
