"""What a run is: its config, from a file and a command line, checked once."""

from woodfisher_jax.training.config.checks import (
    StepOptions,
    check,
    compared,
    from_dict,
    step_options,
)
from woodfisher_jax.training.config.language import LanguageConfig
from woodfisher_jax.training.config.sections import (
    Config,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)
from woodfisher_jax.training.config.values import (
    ConfigError,
    build,
    build_language,
    in_config,
    is_pruner,
    root_of,
    to_dict,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "LanguageConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PruneConfig",
    "StepOptions",
    "TrainConfig",
    "build",
    "build_language",
    "check",
    "compared",
    "from_dict",
    "in_config",
    "is_pruner",
    "root_of",
    "step_options",
    "to_dict",
]
