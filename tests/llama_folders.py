"""Folders of Hugging Face's Transformers: tiny random networks, a published one."""

import json
import os

import numpy as np
import pytest
from random_weights import random_variables

from woodfisher_jax.models.llama import Llama, LlamaConfig
from woodfisher_jax.weights.files import save_safetensors
from woodfisher_jax.weights.state_dicts import to_state_dict

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = np.arange(5)[None]

SMOLLM2 = os.environ.get("WOODFISHER_SMOLLM2")

needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2,
    reason="set WOODFISHER_SMOLLM2 to a folder with SmolLM2-135M-Instruct, for "
    "instance by hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir smollm2",
)


def llama_folder(folder, change=lambda tensors: None, **stated):
    """A folder of a random network; its tensors."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", **SIZES, **stated}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    layers = stated.get("num_hidden_layers", 1)
    tied = bool(stated.get("tie_word_embeddings"))
    sizes = {**SIZES, "num_hidden_layers": layers}
    model = Llama(LlamaConfig(**sizes, tie_word_embeddings=tied))
    variables, _ = random_variables(model, TOKENS)
    tensors = to_state_dict(variables)
    change(tensors)
    save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return tensors
