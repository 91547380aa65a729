"""The models by name. Their variable names map one to one to PyTorch's."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from woodfisher_jax.models.mlp import MLP
from woodfisher_jax.models.resnet_cifar import DEPTHS, CifarResNet

__all__ = ["MLP", "MODELS", "CifarResNet", "build_model", "num_parameters"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    **{f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in DEPTHS},
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
