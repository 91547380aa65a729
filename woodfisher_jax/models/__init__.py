"""The models by name. Their variable names map one to one to PyTorch's.

Each is called as ``model.apply(variables, images, train=False)`` and returns logits
[B, num_classes]. With ``train=True`` batch norms use the batch's statistics and update
``batch_stats``, which must then be mutable; models without them ignore it. With a
``dtype`` such as bfloat16 parameters, statistics and logits are float32 all the same.
``widths`` gives layers other numbers of outputs (`layers.Resizable`).
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from woodfisher_jax.models import resnet, vgg
from woodfisher_jax.models.cifarnet import CifarNet
from woodfisher_jax.models.mlp import MLP, LogisticRegression
from woodfisher_jax.models.mobilenet import MobileNetV1, MobileNetV2
from woodfisher_jax.models.resizing import (
    check_widths,
    layer_outputs,
    narrowed,
    resized,
)
from woodfisher_jax.models.resnet import CifarResNet, ResNet
from woodfisher_jax.models.vgg import VGG
from woodfisher_jax.models.vit import VisionTransformer
from woodfisher_jax.options import shown

__all__ = [
    "MODELS",
    "build_model",
    "check_widths",
    "layer_outputs",
    "narrowed",
    "num_parameters",
    "resized",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "logistic_regression": LogisticRegression,
    "cifarnet": CifarNet,
    **{f"resnet{d}": partial(CifarResNet, depth=d) for d in resnet.CIFAR_DEPTHS},
    **{f"resnet{d}": partial(ResNet, depth=d, widening=1) for d in resnet.DEPTHS},
    "wide_resnet50_2": partial(ResNet, depth=50, widening=2),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    **{f"vgg{d}_bn": partial(VGG, depth=d) for d in vgg.DEPTHS},
    **{
        f"{family}_{size}": partial(VisionTransformer, width=w, num_heads=heads)
        for family in ("deit", "vit")
        for size, w, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
    },
}
"""Model name to the function that builds it from its settings."""


def build_model(name: str, **settings: Any) -> nn.Module:
    """Builds a model by name.

    Args:
        name: A key of `MODELS`.
        **settings: The model's attributes, such as ``num_classes=100``.

    Returns:
        The module, not yet initialised.

    Raises:
        ValueError: There is no such model, or it does not take one of the settings.
    """
    if name not in MODELS:
        raise ValueError(
            f"name: expected one of {', '.join(MODELS)}; got {name!r}."
            f"{_did_you_mean(name, list(MODELS))}"
        )
    build = MODELS[name]
    # The settings that the name fixes and Linen's own are not the caller's.
    fixed = {*getattr(build, "keywords", {}), "parent", "name"}
    parameters = inspect.signature(build).parameters
    allowed = [p for p in parameters if p not in fixed]
    for setting, value in settings.items():
        if setting not in allowed:
            raise ValueError(
                f"model {name!r}: expected settings among {', '.join(allowed)}; "
                f"got {setting!r}.{_did_you_mean(setting, allowed)}"
            )
        _check_setting(setting, value, parameters[setting].default)
    return build(**settings)


def num_parameters(params: Any) -> int:
    """Counts the parameters of a tree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_setting(name: str, value: Any, default: Any) -> None:
    """Raises unless a setting is of the kind of its default.

    Linen takes any value, and fails where it is used first, without its name.
    """

    def is_width(one: Any) -> bool:
        return isinstance(one, int) and not isinstance(one, bool) and 0 < one <= 2**20

    fits, expected = True, ""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        fits, expected = is_width(value), "a whole number from 1 to 2**20"
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and 0 <= value < 1
        expected = "a number from 0 and below 1"
    elif isinstance(default, Mapping):
        fits = isinstance(value, Mapping) and all(map(is_width, value.values()))
        expected = "whole numbers from 1 to 2**20 by path, such as {'fc1': 30}"
    elif isinstance(default, tuple):
        fits = isinstance(value, (tuple, list)) and all(map(is_width, value))
        expected = f"whole numbers from 1 to 2**20 in brackets, such as {default}"
    if not fits:
        raise ValueError(f"{name}={shown(value)}; expected {expected}")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
