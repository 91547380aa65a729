"""A language model of Hugging Face's, pruned layer after layer to 60 %, no training.

    python -m woodfisher_jax.main --config=configs/smollm2.py
        --config.init_from=FOLDER --config.data.dir=TEXT

FOLDER has the config.json, model.safetensors and tokenizer.json of a model of Llama's
form, such as SmolLM2-135M-Instruct; TEXT is a folder of .txt files, or an .npz file of
tokens. Each matrix loses 60 % of its weights, and the others move so that its outputs
stay, then those of its block. With SmolLM2 that takes a quarter of an hour on two
cores; --config.prune.repair=0 leaves the blocks out and takes 3 minutes. The run's
folder gets the pruned model, which Transformers loads, the perplexity before and after,
and a page. docs/language_models.md has the steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.task = "language"
    config.prune = ConfigDict()
    config.prune.sparsity = 0.6
    config.prune.repair = 4
    return config
