"""Turns a config of the original WoodFisher code into one of this project.

    python scripts/convert_config.py resnet50.yaml --update-config --arch=resnet50 \
        --dset=imagenet --target-sparsity 0.9 ... > configs/mine.py

Takes the yaml file and the flags of the original's ``main.py`` as they stand in its
scripts. What has no counterpart, or another meaning, is a line on the standard error;
docs/migration.md says why. Needs PyYAML.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import original_flags

from woodfisher_jax.models import MODELS, build_model
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.network.optimizer import optimizer_settings
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.state_dicts import torch_name

ARCHITECTURES = {"mlpnet": "mlp", "mobilenet": "mobilenet_v1"}
IMAGES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
TRAINING_IMAGES = {"mnist": 60_000, "cifar10": 50_000, "imagenet": 1_281_167}

CHANGES_THE_RESULT = {
    "enable-dropout": "mlp has no dropout here",
    "use_se": "there are no mixed ResNets here",
    "woodtaylor-abs": "the signed statistic is used",
    "subtract-min": "statistics are compared as they are",
    "normalize-hgp": "the first-order term is used as it is",
    "disable-train-shuffle": "batches are always shuffled",
    "previous-mask": "the path of the loss ends at the new mask",
}


DIAGNOSTICS = (
    "compare_globalmagni_mask",
    "spearman_globalmagni",
    "fisher_trace",
    "inspect_inv",
)


def convert(flags: Namespace, file: Mapping[str, Any]) -> tuple[dict, list]:
    """The values of a config here, and what should be known about it."""
    notes = [
        f"--{flag}: {what}"
        for flag, what in CHANGES_THE_RESULT.items()
        if getattr(flags, flag.replace("-", "_"))
    ]
    if flags.pretrained and not flags.from_checkpoint_path:
        notes.append("--pretrained: set config.init_from to a file of the weights")
    notes += [
        f"--{flag}: idle without --update-config, as there"
        for flag in original_flags.idle(flags)
    ]
    file = override(flags, file)
    model = _model(flags)
    trainer = file["trainers"]["default_trainer"]
    values = {
        "seed": flags.seed,
        "checkpoint_every_epochs": flags.checkpoint_freq,
        "init_from": flags.from_checkpoint_path or flags.load_distiller_weights_from,
        "data": {
            "name": flags.dset,
            "augment": not flags.disable_train_random_transforms,
            "autoaugment": flags.aa,
        },
        "model": model,
        "train": _train(flags, file, trainer, notes),
    }
    if flags.test_batch_size:
        values["eval_batch_size"] = flags.test_batch_size
    decay = trainer["optimizer"].get("weight_decay", 0)
    for number, section in enumerate(file["pruners"].values(), 1):
        name = "prune" if number == 1 else f"prune_{number}"
        values[name] = _pruner(flags, section, model, decay, notes)
    extra = [key for key in ("regularizers", "recyclers") if file.get(key)]
    notes += [f"{key}: left out; no config of the original has them" for key in extra]
    return values, notes


def override(flags: Namespace, file: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--update-config`` makes of the file."""
    pruners = {name: dict(section) for name, section in file["pruners"].items()}
    trainer = dict(file["trainers"]["default_trainer"])
    trainer["optimizer"] = dict(trainer["optimizer"])
    first = next(iter(pruners.values()))
    if flags.update_config:
        for section in pruners.values():
            section["class"] = flags.prune_class
            if flags.prune_bias:
                section["weight_only"] = False
        start, frequency, end = first["epochs"]
        if flags.prune_freq is not None and flags.prune_end is not None:
            start = 0
        given = (flags.prune_start, flags.prune_freq, flags.prune_end)
        first["epochs"] = [
            old if new is None else new
            for old, new in zip((start, frequency, end), given, strict=True)
        ]
        changes = {
            "modules": flags.prune_modules and flags.prune_modules.split("_"),
            "initial_sparsity": flags.init_sparsity,
            "target_sparsity": flags.target_sparsity,
        }
        first.update({k: v for k, v in changes.items() if v is not None})
        if flags.prune_all:
            first["modules"] = None
        _override_optimizer(flags, trainer["optimizer"])
    return {**file, "pruners": pruners, "trainers": {"default_trainer": trainer}}


def _override_optimizer(flags: Namespace, optimizer: dict) -> None:
    changes = {
        "class": flags.prune_optimizer,
        "lr": flags.prune_lr,
        "weight_decay": flags.prune_wdecay,
    }
    if "momentum" in optimizer or flags.set_prune_momentum:
        changes["momentum"] = flags.prune_momentum
    optimizer.update({k: v for k, v in changes.items() if v is not None})


def _model(flags: Namespace) -> dict[str, Any]:
    name = ARCHITECTURES.get(flags.arch, flags.arch)
    if name != "mlp":
        return {"name": name}
    return {
        "name": name,
        "hidden": (flags.num_hidden_nodes1, flags.num_hidden_nodes2),
        "num_classes": flags.num_classes,
        # The flag is inverted: passing it enables biases.
        "use_bias": flags.disable_bias,
    }


# ---------------------------------------------------------------------------- training


def _train(
    flags: Namespace, file: Mapping, trainer: Mapping, notes: list[str]
) -> dict[str, Any]:
    optimizer = dict(trainer["optimizer"])
    name = str(optimizer.pop("class")).lower()
    ends = [section["epochs"][2] for section in file["pruners"].values()]
    epochs = flags.epochs if flags.epochs is not None else ends[0] + 1
    if flags.update_config:
        epochs = max(epochs, ends[0] + 1)
    skipped = ends[0] if flags.repeated_one_shot else 0
    values = {
        "epochs": 0 if flags.one_shot else epochs - skipped,
        "batch_size": flags.batch_size,
        "learning_rate": float(optimizer.pop("lr")),
        "weight_decay": float(optimizer.pop("weight_decay", 0)),
        "label_smoothing": flags.label_smoothing,
        "weight_decay_after_pruning": not flags.disable_wdecay_after_prune,
        "optimizer": {"name": name, **_settings(name, optimizer, notes)},
    }
    if not flags.one_shot:
        scheduler = trainer.get("lr_scheduler")
        values |= _schedule(dict(scheduler or {}), skipped, values, notes)
    return values


def _settings(name: str, given: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Keyword arguments of torch.optim as those of Optax."""
    settings: dict[str, Any] = {}
    if name == "sgd":
        settings["momentum"] = float(given.pop("momentum", 0.0))
    if "betas" in given:
        settings["b1"], settings["b2"] = map(float, given.pop("betas"))
    names = {"alpha": "decay", "rho": "rho", "centered": "centered"}
    names |= {"momentum": "momentum", "nesterov": "nesterov", "eps": "eps"}
    for key, value in given.items():
        if names.get(key) in optimizer_settings(name):
            number = isinstance(value, (int, float, str)) and not isinstance(
                value, bool
            )
            settings[names[key]] = float(value) if number else value
        else:
            notes.append(f"optimizer.{key}={value}: Optax's {name} has none")
    if name == "rmsprop":
        # PyTorch's defaults, where Optax has 0.9 and the eps within the root.
        settings = {"decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False} | settings
    return settings


def _schedule(
    given: dict[str, Any], skipped: int, train: Mapping, notes: list[str]
) -> dict[str, Any]:
    """A scheduler of torch.optim that is stepped after the epochs of its list."""
    if not given:
        return {}
    kind = given.pop("class")
    start, frequency, end = given.pop("epochs")
    start, end = start - skipped, end - skipped
    floor = float(given.get("eta_min", 0.0))
    if kind in ("ExponentialLR", "StepLR"):
        size = given.get("step_size", 1)
        return {
            "schedule": "step",
            "decay_rate": float(given.get("gamma", 0.1)),
            "decay_start_epoch": start + (size - 1) * frequency + 1,
            "decay_every_epochs": size * frequency,
            "decay_end_epoch": end + 1,
        }
    if kind == "MultiStepLR":
        epochs = [start + (m - 1) * frequency + 1 for m in given["milestones"]]
        return {
            "schedule": "multistep",
            "decay_rate": float(given.get("gamma", 0.1)),
            "decay_at_epochs": tuple(epoch for epoch in epochs if epoch <= end + 1),
        }
    if kind == "CosineAnnealingWarmRestarts":
        return {
            "schedule": "cosine_restarts",
            "decay_every_epochs": given["T_0"] * frequency,
            "final_learning_rate": floor,
        }
    if kind == "CosineAnnealingLR":
        if given["T_max"] * frequency != train["epochs"]:
            notes.append("lr_scheduler: cosine ends with the last epoch here")
        return {"schedule": "cosine", "final_learning_rate": floor}
    notes.append(f"lr_scheduler {kind}: choose one of config.train.schedule by hand")
    return {}


# ----------------------------------------------------------------------------- pruners


def _pruner(
    flags: Namespace,
    section: Mapping[str, Any],
    model: Mapping[str, Any],
    decay: float,
    notes: list[str],
) -> dict[str, Any]:
    method = original_flags.METHODS.get(section["class"], section["class"])
    values = {
        "method": method,
        "prunable": _prunable(section["modules"], model, flags.dset, notes),
        "prune_biases": not section.get("weight_only", True),
        **_steps(flags, section, notes),
        **_samples(flags, method),
        **_curvature(flags, method, decay),
        **_update(flags, method, notes),
    }
    if flags.recompute_bn_stats:
        values["batch_norm_samples"] = TRAINING_IMAGES.get(flags.dset, 50_000)
    if flags.num_path_steps > 0:
        values["loss_path_steps"] = int(flags.num_path_steps)
    values["diagnostics"] = any(getattr(flags, flag) for flag in DIAGNOSTICS)
    return values


def _steps(
    flags: Namespace, section: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    target = float(section["target_sparsity"])
    if flags.one_shot:
        return {"one_shot": True, "target_sparsity": target}
    start, frequency, end = section["epochs"]
    if (end - start) % frequency:
        notes.append(
            f"epochs {section['epochs']}: the last step is at {end} and reaches the "
            "target, which the original misses"
        )
    return {
        "repeated_one_shot": flags.repeated_one_shot,
        "at_launch": flags.prune_at_launch,
        "start": start,
        "end": end,
        "frequency": frequency,
        "degree": float(section.get("degree", 3)),
        "initial_sparsity": float(section["initial_sparsity"]),
        "target_sparsity": target,
    }


def _samples(flags: Namespace, method: str) -> dict[str, Any]:
    """How many examples, and how they are drawn."""
    if method in ("magni", "globalmagni"):
        return {}
    augmented = flags.dset != "mnist" and not flags.disable_train_random_transforms
    values = {
        "num_samples": flags.num_samples,
        "augment": augmented,
        "redraw_samples": not flags.cache_subset_ids,
    }
    if method not in ("diagfisher", "naivehess"):
        values |= {
            "num_samples": flags.fisher_subsample_size,
            "batch_size": max(1, flags.fisher_mini_bsz),
            "microbatch_size": flags.max_mini_bsz,
        }
    return values


def _curvature(flags: Namespace, method: str, decay: float) -> dict[str, Any]:
    if method in ("magni", "globalmagni"):
        return _flops(flags) if method == "globalmagni" else {}
    if method in ("diagfisher", "naivehess"):
        # Other flags are ignored there.
        return {"scope": "layer"}
    values = {
        "scope": "global" if flags.woodburry_joint_sparsify else "layer",
        "damping": flags.fisher_damp,
        "damping_plus_weight_decay": flags.fisher_effective_damp and decay > 0,
    }
    if method == "kfac":
        return {**values, "pi": flags.kfac_pi}
    if method in ("woodfisherblock", "woodfisherblock_flops"):
        values |= _flops(flags)
    if method == "woodfisherblock_flops":
        values["flops_target"] = flags.flops_target
    split = flags.fisher_split_grads and method not in ("woodfisher", "woodtaylor")
    if split or method == "woodfisherblockgroup":
        values["block_size"] = flags.fittable_params
    if method == "woodtaylorblock":
        values["centered"] = flags.centered
        values["mean_samples"] = flags.grad_subsample_size
    if method.startswith("woodfisherblock") or method == "woodtaylorblock":
        values["true_fisher"] = flags.true_fisher
    if method.startswith("woodfisherblock"):
        values["label_smoothing"] = flags.hess_label_smoothing or 0.0
    return values


def _flops(flags: Namespace) -> dict[str, Any]:
    if not flags.flops_power:
        return {}
    return {
        "flops_power": flags.flops_power,
        "flops_per_parameter": flags.flops_per_param,
        # A division by a million divides all saliencies alike.
        "flops_normalize": "log" if flags.flops_normalize == "log" else "none",
    }


def _update(flags: Namespace, method: str, notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if flags.scale_prune_update != 1:
        if method.startswith("woodfisherblock"):
            values["scale_update"] = flags.scale_prune_update
        else:
            notes.append(f"--scale-prune-update: the original's {method} ignores it")
    if flags.normalize_update and method == "woodtaylorblock":
        values["normalize_update"] = flags.normalize_update_mult
    if flags.recompute_num and method == "woodfisherblock":
        values["recompute"] = flags.recompute_num
        values["recompute_schedule"] = flags.recompute_schedule or "linear"
        if flags.recompute_schedule == "poly":
            values["recompute_degree"] = flags.recompute_degree
    return values


def _prunable(
    modules: list[str] | None, model: Mapping[str, Any], data: str, notes: list[str]
) -> str | None:
    """A regular expression on paths that selects the modules of the original."""
    if modules is None:
        return None
    if model["name"] not in MODELS:
        notes.append(f"modules: model {model['name']!r} is not there; set prunable")
        return None
    settings = {key: value for key, value in model.items() if key != "name"}
    image = np.zeros((1, *IMAGES.get(data, (224, 224, 3))), np.float32)
    network = build_model(model["name"], **settings)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    paths = [path for path, leaf in leaves_by_path(shapes).items() if leaf.ndim >= 2]
    by_module = {
        torch_name(f"params/{path}").removesuffix(".weight"): path for path in paths
    }
    for name in set(modules) - set(by_module):
        notes.append(f"modules: {model['name']} has no layer {name!r}; left out")
    chosen = [by_module[name] for name in by_module if name in modules]
    others = [path for path in paths if path not in chosen]
    if not others:
        return None
    if len(others) < len(chosen):
        names = "|".join(path.removesuffix("kernel") for path in others)
        return f"^(?!{names}).*kernel$"
    return f"^({'|'.join(path.removesuffix('/kernel') for path in chosen)})/kernel$"


# ------------------------------------------------------------------------------ output


def differences(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict:
    """What of nested values is not the default."""
    found = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and not key.startswith("prune_"):
            rest = differences(value, default if isinstance(default, Mapping) else {})
            if rest:
                found[key] = rest
        elif value != default:
            found[key] = value
    return found


def render(values: Mapping[str, Any], command: str) -> str:
    """The text of a config file."""
    defaults = config_.to_dict(config_.Config())
    stated = differences(values, defaults)
    for key in [key for key in stated if key.startswith("prune_")]:
        first = {**defaults["prune"], **values["prune"]}
        stated[key] = differences(values[key], first)
    lines = [
        '"""Converted from the original\'s config by scripts/convert_config.py.',
        "",
        f"    {command}",
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """Returns what differs from the defaults."""',
        "    config = ConfigDict()",
    ]
    for key, value in stated.items():
        if not isinstance(value, dict):
            lines.append(f"    config.{key} = {value!r}")
    for key, value in stated.items():
        if isinstance(value, dict):
            lines += ["", f"    config.{key} = ConfigDict()"]
            lines += [f"    config.{key}.{name} = {v!r}" for name, v in value.items()]
    return "\n".join([*lines, "    return config", ""])


def main(arguments: list[str]) -> None:
    """Prints the config file, and on the standard error what should be known."""
    flags = original_flags.parse(arguments, __doc__ or "")
    values, notes = convert(flags, original_flags.read(flags.yaml))
    text = render(values, shlex.join(["convert_config.py", *arguments]))
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)
    try:
        config_.from_dict(values)
    except config_.ConfigError as error:
        print(f"note: the config needs a change by hand: {error}", file=sys.stderr)
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
