"""A language model of Hugging Face's, pruned layer after layer to 60 %, no training.

    python -m woodfisher_jax.main --config=configs/smollm2.py
        --config.init_from=FOLDER --config.data.dir=TEXT

FOLDER has the config.json, model.safetensors and tokenizer.json of a model of Llama's
form, such as SmolLM2-135M-Instruct; TEXT is a folder of .txt files, or an .npz file of
tokens. The matrices lose 60 % of their weights, those the more that matter less to the
network's outputs, and the others move so that each matrix's outputs stay. SmolLM2-135M
takes 7 minutes of one core; --config.prune.repair=4 also fits blocks, for 18 more. The
run's folder gets the pruned model, which Transformers loads, the perplexity before and
after, and a page. docs/language_models.md has the steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.task = "language"
    config.prune = ConfigDict()
    config.prune.sparsity = 0.6
    config.prune.scope = "global"
    config.prune.metric = "softmax"
    # Chosen on calibration text: 16,384 tokens say little of most directions.
    config.prune.damping = 0.15
    return config
