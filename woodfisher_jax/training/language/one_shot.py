"""A language model pruned in one shot: read, pruned, measured, written."""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from woodfisher_jax.data.array_records import DataMissingError
from woodfisher_jax.data.tokens import Tokens, read_tokens
from woodfisher_jax.extras import MissingExtraError
from woodfisher_jax.info import unwarned
from woodfisher_jax.layerwise.prune import prune_layerwise
from woodfisher_jax.layerwise.settings import LayerwiseInfo
from woodfisher_jax.models import num_parameters, resized
from woodfisher_jax.models.llama import Llama
from woodfisher_jax.options import OptionError
from woodfisher_jax.progress import Callback, live
from woodfisher_jax.report import environment, language, metrics
from woodfisher_jax.shrink import shrunk
from woodfisher_jax.training.config import (
    ConfigError,
    LanguageConfig,
    in_config,
    to_dict,
)
from woodfisher_jax.training.language.perplexity import perplexity
from woodfisher_jax.training.resuming.workdir import (
    held,
    log_file,
    removed_unless_started,
)
from woodfisher_jax.weights import hugging_face
from woodfisher_jax.weights.state_dicts import StateDictMismatchError
from woodfisher_jax.written_files import check_room, replace_file

MODEL = "model"
"""Folder of the pruned network, in that of the run."""

TIMES = "times.json"
"""Milliseconds of products on the machine of the run, by their widths."""

_FIELDS = {"params": "config.init_from", "inputs": "config.init_from"}
"""The fields that are at fault for arguments that are no options.

Tokens are finite: inputs of a layer that are not come from the network.
"""

logger = logging.getLogger(__name__)


def run(
    config: LanguageConfig, workdir: str | Path, *, quiet: bool = False
) -> dict[str, Any]:
    """Prunes a language model, and writes it with what became of it.

    Args:
        config: Checked.
        workdir: Folder of the run, which is made: ``config.json``, ``results.json``,
            ``report.html`` where matplotlib is installed, ``log.txt``, and in ``model``
            the network as Hugging Face's Transformers loads it.
        quiet: Whether to show no progress.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: If a field is missing or does not fit, the network or the text
            cannot be read, the network has no head, or the folder has a run already; a
            new folder is removed.
        WriteError: If the disk does not take a file.
    """
    workdir, start = Path(workdir), time.perf_counter()
    seconds: dict[str, float] = {}
    timed = functools.partial(_timed, seconds)
    source = source_of(config)
    _check_start(config, workdir)
    with live("pruning", quiet=quiet) as progress, timed("read"):
        module, params, tokens = _read(config, source, progress)
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    with (
        held(workdir),
        removed_unless_started(made, ConfigError),
        log_file(workdir),
        live("pruning", quiet=quiet) as progress,
    ):
        check_room(workdir, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        replace_file(
            workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n"
        )

        logger.info(
            "%s: %d sequences to prune with, %d to evaluate on",
            source,
            len(tokens.calibration),
            len(tokens.evaluation),
        )
        _warn_of_length(module, tokens)

        net_fn = logits_of(module)
        pruned, info = _pruned(config, workdir, net_fn, params, tokens, progress)
        logger.info("pruned to %.2f %%\n%s", 100 * info.sparsity, info)
        with timed("perplexity"):
            dense = _measured(module, params, tokens, progress)
        whole = num_parameters(params)
        del params  # Room for what is written.
        with timed("write"):
            progress("write", 0, 1)
            hugging_face.write_folder(workdir / MODEL, pruned, source)
            progress("write", 1, 1)
        left = num_parameters(pruned)
        del pruned  # Once is enough in memory.
        with timed("read"):
            # As it is in the folder, rounded to the dtype there.
            _, pruned = hugging_face.read_folder(workdir / MODEL)
        with timed("perplexity"):
            found = _measured(module, pruned, tokens, progress)
        logger.info("perplexity %.2f -> %.2f", dense["all"], found["all"])
        if left < whole:
            logger.info("parameters %s -> %s", f"{whole:,}", f"{left:,}")
        results = _results(
            config,
            info,
            tokens,
            parameters={"dense": whole, "pruned": left},
            perplexities={"dense": dense, "pruned": found},
            seconds=seconds,
            total=time.perf_counter() - start,
        )
        metrics.write_results(workdir, results)
        try:
            language.write_page(workdir)
        except MissingExtraError as error:
            logger.warning("%s", error)
    return results


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the wall time of the block to that of a phase."""
    since = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - since


def _check_start(config: LanguageConfig, workdir: Path) -> None:
    """Refuses a run without text, and a folder that has one already."""
    if config.data.dir is None:
        raise ConfigError(
            "config.data.dir=None; expected the text that pruning looks at: "
            "--config.data.dir=FOLDER of .txt files, or an .npz file of tokens"
        )
    if (workdir / "results.json").exists():
        raise ConfigError(
            f"workdir={workdir} holds a run that has ended; choose another --workdir"
        )


def source_of(config: LanguageConfig) -> Path:
    """The folder of the network.

    Raises:
        ConfigError: If there is none.
    """
    if config.init_from is None:
        raise ConfigError(
            "config.init_from=None; expected the model that is pruned: "
            "--config.init_from=FOLDER, with its config.json and model.safetensors"
        )
    return Path(config.init_from)


def logits_of(module: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, tokens) -> logits."""

    def net_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = module.apply({"params": params}, tokens)
        assert isinstance(logits, jax.Array)
        return logits

    return net_fn


def _read(
    config: LanguageConfig, source: Path, progress: Callback
) -> tuple[Llama, Any, Tokens]:
    """The network and the text.

    Raises:
        ConfigError: If one of them cannot be taken, with the field.
    """
    progress("read", 0, 1)
    module, params = decoder(hugging_face.read_folder, source)
    data = config.data
    try:
        tokens = read_tokens(
            str(data.dir),
            module.config.vocab_size,
            length=data.length,
            tokenizer=source,
        )
    except (DataMissingError, ValueError) as error:
        raise ConfigError(f"config.data.dir: {error}") from error
    progress("read", 1, 1)
    return (
        module,
        params,
        Tokens(
            tokens.calibration[: data.calibration],
            tokens.evaluation[: data.evaluation],
            tokens.kinds[: data.evaluation],
        ),
    )


def decoder(
    read: Callable[[Path], tuple[nn.Module, Any]], source: Path
) -> tuple[Llama, Any]:
    """The network of a folder, and its parameters or their shapes.

    Args:
        read: Of `hugging_face`.
        source: The folder.

    Raises:
        ConfigError: If it cannot be read, or gives no probabilities of tokens.
    """
    try:
        module, params = read(source)
    except (hugging_face.FolderError, StateDictMismatchError) as error:
        raise ConfigError(f"config.init_from: {error}") from error
    if not isinstance(module, Llama):
        raise ConfigError(
            f"config.init_from={str(source)!r} is a {type(module).__name__}, which "
            "gives no probabilities of tokens; expected a causal language model. In "
            "Python wf.prune_layerwise prunes it"
        )
    return module, params


def _warn_of_length(module: Llama, tokens: Tokens) -> None:
    most = module.config.max_position_embeddings
    for name in ("calibration", "evaluation"):
        length = getattr(tokens, name).shape[1]
        if length > most:
            logger.warning(
                "%s: sequences of %d tokens, and the network was trained with at most "
                "%d, so that its predictions beyond may mean little; expected shorter "
                "ones: set config.data.length, or cut the .npz file",
                name,
                length,
                most,
            )


def _pruned(
    config: LanguageConfig,
    workdir: Path,
    net_fn: Any,
    params: Any,
    tokens: Tokens,
    progress: Callback,
) -> tuple[Any, LayerwiseInfo]:
    options = {
        field.name: getattr(config.prune, field.name)
        for field in dataclasses.fields(config.prune)
    }
    try:
        # The log and the page have what is warned of, without a line of this package.
        with unwarned():
            pruned, masks, info = prune_layerwise(
                net_fn,
                params,
                tokens.calibration,
                times=None if config.prune.latency is None else workdir / TIMES,
                progress=progress,
                **options,
            )
    except OptionError as error:
        if error.name in _FIELDS:
            raise ConfigError(f"{_FIELDS[error.name]}: {error}") from error
        raise in_config(error, "config.prune") from error
    if ":" not in (config.prune.pattern or ":"):
        _, pruned = shrunk(net_fn, pruned, masks, tokens.calibration[:1])
    return pruned, info


def _measured(
    module: Llama, weights: Any, tokens: Tokens, progress: Callback
) -> dict[str, Any]:
    """The perplexity of a network on the text that it is evaluated on."""
    weights = jax.device_put(weights)
    text = tokens.evaluation, tokens.kinds
    # Of its own widths, where structure was taken out.
    own = resized(module, {"params": weights}, tokens.evaluation[:1])
    return perplexity(logits_of(own), weights, *text, progress)._asdict()


def _results(
    config: LanguageConfig,
    info: LayerwiseInfo,
    tokens: Tokens,
    *,
    parameters: dict[str, int],
    perplexities: dict[str, dict[str, Any]],
    seconds: dict[str, float],
    total: float,
) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        config: Of the run.
        info: What pruning has reported.
        tokens: The text.
        parameters: Of the ``dense`` and of the ``pruned`` network.
        perplexities: Of both.
        seconds: Of the phases read, write and perplexity.
        total: Seconds of the run.
    """
    return {
        "task": config.task,
        "sparsity": info.sparsity,
        "nonzero": info.nonzero,
        "prunable": info.prunable,
        "parameters": parameters,
        "costs": {name: cost._asdict() for name, cost in info.costs.items()},
        "perplexity": perplexities,
        "layers": [layer._asdict() for layer in info.layers],
        "seconds": {
            "read": seconds["read"],
            **{f"prune: {phase}": s for phase, s in info.seconds.items() if s},
            "write": seconds["write"],
            "perplexity": seconds["perplexity"],
        },
        "seconds_total": total,
        "peak_rss_bytes": environment.peak_rss_bytes(),
        **environment.environment(),
        "calibration_tokens": int(tokens.calibration.size),
        "evaluation_tokens": int(tokens.evaluation.size),
        "config": to_dict(config),
    }
