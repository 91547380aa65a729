"""The config of a language model that is pruned layer after layer, without training."""

import dataclasses

from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.options import Options, option

TASK = "language"
"""What ``task`` says in a config of this kind."""


@dataclasses.dataclass(frozen=True)
class TextConfig(Options):
    """Which text, and how much of it."""

    dir: str | None = option(
        None,
        "Folder of .txt files, each a kind of text, or an .npz file of tokens with the "
        "arrays calibration and evaluation [sequences, tokens], and perhaps kinds.",
    )
    length: int = option(512, "Tokens a sequence, of a folder.", least=2)
    calibration: int | None = option(
        32, "First sequences that pruning looks at; None for all.", least=1
    )
    evaluation: int | None = option(
        12, "First sequences that perplexity is measured on; None for all.", least=1
    )


@dataclasses.dataclass(frozen=True)
class LayersConfig(Layerwise):
    """How far the layers are pruned, and how."""

    sparsity: float | None = option(
        None,
        "Fraction of the weights to be zero; default that of the pattern.",
        least=0,
        below=1,
    )
    pattern: str | None = option(
        None,
        "N:M such as 2:4, or structures (neurons, heads), which are taken out; default "
        "single weights.",
    )
    size: float | None = option(
        None,
        "With structures in place of a sparsity: the share of the parameters to be "
        "left.",
        above=0,
        most=1,
    )
    macs: float | None = option(
        None,
        "The same of the multiply-accumulates; with size, both hold.",
        above=0,
        most=1,
    )
    latency: float | None = option(
        None,
        "The same of the time of the network's products on this machine, for a batch "
        "of batch_size; they are timed first, and times.json of the run keeps that.",
        above=0,
        most=1,
    )
    prunable: str | None = option(
        r"layers?_\d+/.*kernel$",
        "Regular expression of the tensors to prune; default those of all blocks.",
    )


@dataclasses.dataclass(frozen=True)
class LanguageConfig(Options):
    """A pruned language model: which, on what text, how."""

    task: str = option(TASK, "The kind of the config.", choices=(TASK,))
    init_from: str | None = option(
        None,
        "Folder of Hugging Face's Transformers with config.json and model.safetensors.",
    )
    data: TextConfig = TextConfig()
    prune: LayersConfig = LayersConfig()
