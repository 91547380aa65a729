"""Which weights each pruner of a run prunes."""

from typing import Any

import jax

from woodfisher_jax.training.config import Config, ConfigError, PruneConfig
from woodfisher_jax.trees import prunable
from woodfisher_jax.trees.axes import Axes
from woodfisher_jax.trees.masks import Masks
from woodfisher_jax.trees.paths import leaves_by_path


def selected_paths(
    params: Any, pruner: PruneConfig, axes: Axes | None = None
) -> tuple[str, ...]:
    """Paths of the parameters that a pruner prunes, in the order of the tree.

    Args:
        params: Linen parameters, or their shapes.
        pruner: Its section of the config.
        axes: What the model does with them; default what their shapes tell.

    Raises:
        ValueError: If it selects nothing.
    """
    leaves = leaves_by_path(params)
    chosen = set(
        jax.eval_shape(lambda p: prunable.init_masks(p, pruner.prunable, axes), params)
    )
    if pruner.prune_biases:
        chosen |= {f"{path.rpartition('/')[0]}/bias" for path in chosen} & set(leaves)
    return tuple(path for path in leaves if path in chosen)


def init_masks(params: Any, config: Config, axes: Axes | None = None) -> Masks:
    """All-True masks over what all pruners of a run prune together.

    Args:
        params: Linen parameters.
        config: The run's config.
        axes: What the model does with them; default what their shapes tell.

    Raises:
        ConfigError: If a pruner selects nothing, or two the same parameter.
    """
    owner: dict[str, str] = {}
    for name, pruner in config.pruners.items():
        try:
            paths = selected_paths(params, pruner, axes)
        except ValueError as error:
            raise ConfigError(f"config.{name}.{error}") from error
        for path in paths:
            if path in owner:
                raise ConfigError(
                    f"config.{owner[path]}.prunable={_expression(config, owner[path])} "
                    f"and config.{name}.prunable={_expression(config, name)} both "
                    f"select {path!r}; expected regular expressions that share none"
                )
            owner[path] = name
    return prunable.init_masks(params, lambda path, leaf: path in owner)


def _expression(config: Config, name: str) -> str:
    return repr(config.pruners[name].prunable)
