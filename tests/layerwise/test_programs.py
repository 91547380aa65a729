"""The programs that are listed are those that a run compiles."""

import re

import jax
import numpy as np
import pytest
from llama_folders import SIZES

import woodfisher_jax as wf
from woodfisher_jax.layerwise.programs import calls
from woodfisher_jax.layerwise.prune import prepared
from woodfisher_jax.models.llama import Llama, LlamaConfig
from woodfisher_jax.progress import silent

TOKENS = np.arange(24).reshape(4, 6) % 11
WITHOUT = {"macs": None, "size": None, "latency": None}
OWN = ("jaxpr_as_fun", "summed_", "projected", "pruned_layer", "layer_error")
"""Names of what is no single operation."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "scope": "global", "metric": "softmax", "repair": 1},
        {"pattern": "2:4", "distil": 1, "repair_stages": 3, "sparsity": None},
    ],
    ids=["global", "2:4"],
)
def test_a_run_compiles_what_is_listed(
    options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = SIZES | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    module = Llama(LlamaConfig(**sizes))

    def net(params, tokens):
        return module.apply({"params": params}, tokens)

    def compiled() -> set[str]:
        """Names and types of the programs since the last call; JAX forgets them."""
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        jax.clear_caches()
        found = [
            re.match(r"Compiling (\S+) with global shapes and types (.*)\. Arg", line)
            for line in lines
        ]
        every = [f"{one[1]} {one[2]}" for one in found if one]
        return {line for line in every if any(own in line for own in OWN)}

    params = module.init(jax.random.key(0), TOKENS)["params"]
    shapes = jax.eval_shape(lambda: params)
    common = {"prunable": r"layers_\d+/.*kernel", "batch_size": 2, **options}
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        listed = calls(
            *prepared(net, shapes, TOKENS, shares=WITHOUT, progress=silent, **common)
        )
        for call in listed:
            call.lower(None)
        planned = compiled()
        wf.prune_layerwise(net, params, TOKENS, progress=False, **common)
        assert planned == compiled()
