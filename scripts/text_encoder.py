"""An encoder of texts pruned layer after layer: embeddings, and a probe on them.

    python scripts/text_encoder.py FOLDER TEXTS.npz \
        --rows 0.5 0.6 0.7 0.8 2:4 "0.8 scope=global" "0.8 repair=4 repair_stages=6"

FOLDER is an encoder of BERT's form as Hugging Face's Transformers has it. TEXTS.npz has
the tokens ``calibration``, ``train`` and ``test`` [texts, tokens], 0 where a text has
ended, and ``train_labels`` and ``test_labels``. A row is a sparsity or N:M and options
of ``wf.prune_layerwise``. An embedding is the mean of a text's hidden states, of norm
1. Prints a line of JSON a row: mean and lowest tenth of the cosines of the test texts'
embeddings to those of the dense network, and the accuracy of a logistic regression that
is fitted to the pruned network's embeddings (``probe``), or to the dense network's
(``kept``).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from language_model import parsed
from sklearn.linear_model import LogisticRegression

import woodfisher_jax as wf
from woodfisher_jax.models.bert import mean_pooled
from woodfisher_jax.weights.hugging_face import read_folder

PRUNABLE = r"layer_\d+/.*kernel$"
"""The matrices of all blocks."""


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    arguments = parser.parse_args()
    module, dense = read_folder(arguments.folder)
    with np.load(arguments.texts) as file:
        texts = {name: file[name] for name in file.files}

    @jax.jit
    def net_fn(params: Any, tokens: jax.Array) -> jax.Array:
        mask = tokens != 0
        hidden = module.apply({"params": params}, tokens, mask)
        assert isinstance(hidden, jax.Array)
        pooled = mean_pooled(hidden, mask)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    def embeddings(params: Any, name: str) -> np.ndarray:
        parts = np.split(texts[name], range(100, len(texts[name]), 100))
        return np.concatenate([net_fn(params, part) for part in parts])

    def probe(inputs: np.ndarray) -> LogisticRegression:
        found = LogisticRegression(C=10.0, max_iter=2000)
        return found.fit(inputs, texts["train_labels"])

    aims, labels = embeddings(dense, "test"), texts["test_labels"]
    kept = probe(embeddings(dense, "train"))
    print(json.dumps({"row": "dense", "probe": kept.score(aims, labels)}), flush=True)
    for row in arguments.rows:
        start = time.process_time()
        goal, options = parsed(row)
        params, _, info = wf.prune_layerwise(
            net_fn,
            dense,
            texts["calibration"],
            prunable=PRUNABLE,
            **{"batch_size": 64, **goal, **options},
        )
        seconds = time.process_time() - start
        own = embeddings(params, "test")
        cosines = np.sum(own * aims, axis=1)
        found = {
            "row": row,
            "sparsity": info.sparsity,
            "error": float(np.mean([layer.error for layer in info.layers])),
            "cosine": float(cosines.mean()),
            "cosine_p10": float(np.quantile(cosines, 0.1)),
            "probe": probe(embeddings(params, "train")).score(own, labels),
            "kept": kept.score(own, labels),
            "cpu_seconds": round(seconds, 1),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
