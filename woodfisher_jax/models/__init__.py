"""The models by name. Their variable names map one to one to PyTorch's."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from woodfisher_jax.models import resnet, resnet_cifar, vgg
from woodfisher_jax.models.cifarnet import CifarNet
from woodfisher_jax.models.mlp import MLP, LogisticRegression
from woodfisher_jax.models.mobilenet import MobileNetV1, MobileNetV2
from woodfisher_jax.models.resnet import ResNet
from woodfisher_jax.models.resnet_cifar import CifarResNet
from woodfisher_jax.models.vgg import VGG
from woodfisher_jax.models.vit import VisionTransformer

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "CifarNet",
    "CifarResNet",
    "LogisticRegression",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "VisionTransformer",
    "build_model",
    "num_parameters",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "logistic_regression": LogisticRegression,
    "cifarnet": CifarNet,
    **{f"resnet{d}": partial(CifarResNet, depth=d) for d in resnet_cifar.DEPTHS},
    **{f"resnet{d}": partial(ResNet, depth=d, widening=1) for d in resnet.DEPTHS},
    "wide_resnet50_2": partial(ResNet, depth=50, widening=2),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    **{f"vgg{d}_bn": partial(VGG, depth=d) for d in vgg.DEPTHS},
    "deit_tiny": partial(VisionTransformer, width=192, num_heads=3),
    "deit_small": partial(VisionTransformer, width=384, num_heads=6),
    "deit_base": partial(VisionTransformer, width=768, num_heads=12),
}
"""Model name to the function that builds it from its settings."""


def build_model(name: str, **settings: Any) -> nn.Module:
    """Builds a model of the table.

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
            f"model: expected one of {', '.join(MODELS)}; got {name!r}."
            f"{_did_you_mean(name, list(MODELS))}"
        )
    allowed = _settings_of(MODELS[name])
    for setting in settings:
        if setting not in allowed:
            raise ValueError(
                f"model {name!r}: expected settings among {', '.join(allowed)}; "
                f"got {setting!r}.{_did_you_mean(setting, allowed)}"
            )
    return MODELS[name](**settings)


def num_parameters(params: Any) -> int:
    """Counts the parameters of a tree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _settings_of(build: Callable[..., nn.Module]) -> list[str]:
    """The settings a row takes: those it fixes and Linen's own are not among them."""
    fixed = build.keywords if isinstance(build, partial) else {}
    parameters = inspect.signature(build).parameters
    return [p for p in parameters if p not in {*fixed, "parent", "name"}]


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
