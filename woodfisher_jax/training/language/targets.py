"""The programs of a language model's pruning, compiled for a device that is not there.

Of the model ``config.json`` alone is read.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from woodfisher_jax.layerwise.programs import Call, calls
from woodfisher_jax.layerwise.prune import prepared
from woodfisher_jax.layerwise.weights import SingleWeights
from woodfisher_jax.options import OptionError
from woodfisher_jax.progress import Callback
from woodfisher_jax.rows.sharding import placed
from woodfisher_jax.rows.targets import Target
from woodfisher_jax.training import distributed
from woodfisher_jax.training.config import ConfigError, LanguageConfig, in_config
from woodfisher_jax.training.language.one_shot import decoder, logits_of, source_of
from woodfisher_jax.training.language.perplexity import sequence_loss
from woodfisher_jax.training.targets import Lowering, Report, reports
from woodfisher_jax.weights import hugging_face


def compile_language(
    config: LanguageConfig, target: Target, progress: Callback
) -> list[Report]:
    """Compiles the programs of a run for one device of a target; nothing is run.

    Each program is logged as soon as it is compiled.

    Args:
        config: Of the run; of its text ``length`` and ``calibration`` count.
        target: Its devices, of which a run takes one.
        progress: Called with (label, done, total).

    Returns:
        The programs.

    Raises:
        ConfigError: If the run would be refused, or structures go, whose numbers the
            weights and the text decide.
    """
    module, params = decoder(hugging_face.read_shapes, source_of(config))
    text, options = config.data, dataclasses.asdict(config.prune)
    if text.calibration is None:
        raise ConfigError(
            "config.data.calibration=None; expected a number, for a target reads no "
            "text"
        )
    if ":" not in (config.prune.pattern or ":"):
        raise ConfigError(
            f"config.prune.pattern={config.prune.pattern!r}: how many structures each "
            "layer loses, and with it its programs, the weights and the text decide, "
            "which a target does not read; expected N:M or None"
        )
    shares = {name: options.pop(name) for name in ("macs", "size", "latency")}
    net_fn = logits_of(module)
    tokens = np.zeros((text.calibration, text.length), np.int32)
    progress("layers", 0, 1)
    try:
        sequence, solver = prepared(
            net_fn, params, tokens, shares=shares, progress=progress, **options
        )
    except OptionError as error:
        raise in_config(error, "config.prune") from error
    assert isinstance(solver, SingleWeights)
    sequence_of = jax.ShapeDtypeStruct((text.length,), jnp.int32)
    found = calls(sequence, solver)
    found.append(Call("perplexity", sequence_loss, (params, sequence_of), (net_fn,)))
    mesh = distributed.in_one_row(target.devices[:1])
    programs = [
        Lowering(call.name, functools.partial(call.lower, placed(mesh)))
        for call in found
    ]
    return reports(programs, mesh, progress)
