"""A language model pruned in several ways: perplexity, time, error of single layers.

    python scripts/language_model.py prune FOLDER TOKENS.npz \
        --rows "0.6" "2:4" "0.6 repair=4 metric=softmax distil=2"
    python scripts/language_model.py layers FOLDER TOKENS.npz --rows 0.5 0.6 2:4

FOLDER is one of Hugging Face's Transformers, TOKENS.npz has the arrays ``calibration``
and ``evaluation``. A row is a sparsity or a pattern and options of
``wf.prune_layerwise``; what "structures size=0.75" prunes is taken out;
``dense`` is the network as it is. Each row is pruned in a process of its own, so that
its memory is its own, and is printed as a line of JSON; ``--out`` keeps these lines.

``layers`` prunes each matrix of the blocks 0, 5, 10, ... for itself, on inputs in the
dense network, and gives the mean of ‖XW - XP‖² / ‖XW‖² on the calibration text and on
as many sequences that follow it.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import woodfisher_jax as wf
from woodfisher_jax.equations.layerwise import layer_error, pruned_layer
from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.layerwise.weights import PENALTIES
from woodfisher_jax.models import num_parameters
from woodfisher_jax.report.environment import peak_rss_bytes
from woodfisher_jax.selection.named_patterns import parse
from woodfisher_jax.tracing.capture import input_rows, weight_entries
from woodfisher_jax.tracing.layers import Product
from woodfisher_jax.tracing.segments import Program
from woodfisher_jax.training.language.perplexity import perplexity
from woodfisher_jax.trees.masks import num_kept
from woodfisher_jax.trees.paths import leaves_by_path
from woodfisher_jax.weights.hugging_face import read_folder

PRUNABLE = r"layers?_\d+/.*kernel$"
"""The matrices of all blocks."""


def parsed(row: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sparsity or pattern of a row, and its options."""
    goal, *pairs = row.split()
    options = dict(pair.split("=") for pair in pairs)
    return (
        {"sparsity": float(goal)}
        if goal[:1].isdigit() and ":" not in goal
        else {"pattern": goal},
        {name: _value(text) for name, text in options.items()},
    )


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # "global" is a keyword
        return text


def run_row(arguments: argparse.Namespace, row: str) -> dict[str, Any]:
    """Prunes by one row, and measures."""
    module, params = read_folder(arguments.folder)
    with np.load(arguments.tokens) as file:
        sequences = np.roll(file["calibration"], -arguments.first, axis=0)
        calibration = sequences[: arguments.calibration].astype(np.int32)
        evaluation = file["evaluation"][: arguments.evaluation].astype(np.int32)
        if arguments.kept_apart:
            rest = sequences[2 * arguments.calibration :]
            evaluation = rest[: arguments.evaluation].astype(np.int32)
        kinds = [str(k) for k in file["kinds"]] if "kinds" in file else []

    def net_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return module.apply({"params": params}, tokens)  # type: ignore[return-value]

    original = params
    small_fn: Callable[[Any, Any], Any] = net_fn
    start, cpu = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {"row": row}
    if row != "dense":
        goal, options = parsed(row)
        params, masks, info = wf.prune_layerwise(
            net_fn, params, calibration, prunable=PRUNABLE, **goal, **options
        )
        found |= {
            "sparsity": info.sparsity,
            "error": float(np.mean([layer.error for layer in info.layers])),
            "seconds": {name: round(s, 1) for name, s in info.seconds.items()},
        }
    found |= {
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gb": round(peak_rss_bytes() / 1e9, 2),
    }
    kinds = [] if arguments.kept_apart else kinds[: len(evaluation)]
    if row != "dense" and structured(goal.get("pattern")):
        whole = original
        small_fn, params = wf.shrunk(net_fn, params, masks, evaluation[:1])
        found |= {
            "parameters": num_parameters(params) / num_parameters(whole),
            "tokens_a_second": tokens_a_second(small_fn, params, evaluation),
            "dense_tokens_a_second": tokens_a_second(net_fn, whole, evaluation),
        }
    text = perplexity(small_fn, jax.device_put(params), evaluation, kinds)
    return found | {"perplexity": round(text.all, 2), **text.by_kind}


def structured(pattern: str | None) -> bool:
    """Whether a pattern is one of structures, which are taken out."""
    rule = parse(pattern)
    return rule is not None and (bool(rule.kinds) or rule.name == "heads")


def tokens_a_second(net_fn: Any, params: Any, tokens: np.ndarray) -> float:
    """Of a whole forward pass of one sequence, the median of five."""
    compiled = jax.jit(net_fn)
    params, one = jax.device_put(params), jnp.asarray(tokens[:1])
    jax.block_until_ready(compiled(params, one))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, one))
        seconds.append(time.perf_counter() - start)
    return round(one.size / sorted(seconds)[2], 1)


def moments_of(
    program: Program,
    leaves: dict[str, Any],
    tokens: np.ndarray,
    products: list[Product],
) -> dict[Product, np.ndarray]:
    """E[x xᵀ] of the inputs of layers in the dense network."""
    stages = program.stages(products)
    segments = program.segments(
        [tuple(dict.fromkeys(map(program.operand, stage))) for stage in stages]
    )
    sums: dict[Product, np.ndarray] = {}
    for batch in tokens.reshape(-1, 4, tokens.shape[-1]):
        taken: list[Any] = [batch]
        for stage, segment in zip(stages, segments, strict=True):
            values = [jnp.asarray(read.of(leaves[read.path])) for read in segment.reads]
            taken, inputs = segment.run(values, taken)
            place = dict(zip(segment.inputs, inputs, strict=True))
            for product in stage:
                x = np.asarray(input_rows(product, place[program.operand(product)]))[0]
                sums[product] = sums.get(product, 0) + x.T @ x / tokens.size
    return sums


def layer_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors of single matrices, by row."""
    module, params = read_folder(arguments.folder)
    with np.load(arguments.tokens) as file:
        number = arguments.calibration
        sequences = np.roll(file["calibration"], -arguments.first, axis=0)
        own = sequences[:number].astype(np.int32)
        other = sequences[number : 2 * number].astype(np.int32)

    def net_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return module.apply({"params": params}, tokens)  # type: ignore[return-value]

    program = Program(net_fn, params, own[:4])
    products = [
        use
        for path, uses in program.uses.items()
        for use in uses
        if (found := re.search(r"layers?_(\d+)/.*kernel$", path))
        and int(found[1]) % 5 == 0
        and isinstance(use, Product)
    ]
    leaves = leaves_by_path(params)
    used = moments_of(program, leaves, own, products)
    held = moments_of(program, leaves, other, products)
    rows = []
    for row in arguments.rows:
        goal, options = parsed(row)
        # The damping of the figures in docs/benchmarks.md, unless a row has its own.
        settings = Layerwise().replace(**{"damping": 0.01} | options)
        pattern = goal.get("pattern")
        start, errors, held_out = time.process_time(), [], []
        for product in products:
            leaf = np.asarray(leaves[product.path])
            weights = leaf.reshape(-1)[weight_entries(product, leaf.shape)]
            moment = jnp.asarray(used[product])[None]
            new, _ = pruned_layer(
                weights,
                moment,
                moment,
                jnp.ones(weights.shape[:2]),
                jnp.ones(weights.shape, bool),
                num_kept(weights.size, goal.get("sparsity", 0.0)),
                settings.damping,
                jnp.asarray(PENALTIES),
                pattern=tuple(map(int, pattern.split(":"))) if pattern else None,
                rounds=settings.rounds,
                polish=settings.polish,
            )
            errors.append(float(layer_error(weights, new, moment)))
            other_moment = jnp.asarray(held[product])[None]
            held_out.append(float(layer_error(weights, new, other_moment)))
        rows.append(
            {
                "row": row,
                "matrices": len(errors),
                "error": round(float(np.mean(errors)), 5),
                "geometric": round(float(np.exp(np.mean(np.log(errors)))), 5),
                "held_out": round(float(np.mean(held_out)), 5),
                "cpu_seconds": round(time.process_time() - start, 1),
            }
        )
    return rows


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prune", "layers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--calibration", type=int, default=32, help="sequences")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="calibration sequence to begin with; the first follows the last",
    )
    parser.add_argument("--evaluation", type=int, default=12, help="sequences")
    parser.add_argument(
        "--kept-apart",
        action="store_true",
        help="evaluate on calibration text, behind twice what is pruned with: by this "
        "options are chosen",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command == "layers":
        lines = [json.dumps(row) for row in layer_rows(arguments)]
    elif arguments.alone:
        print(json.dumps(run_row(arguments, arguments.rows[0])))
        return
    else:
        own = [str(arguments.folder), str(arguments.tokens), "--alone"]
        own += [f"--calibration={arguments.calibration}"]
        own += [f"--evaluation={arguments.evaluation}", f"--first={arguments.first}"]
        own += ["--kept-apart"] * arguments.kept_apart
        lines = []
        for row in arguments.rows:
            command = [sys.executable, __file__, "prune", *own, "--rows", row]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True
            )
            lines.append(done.stdout.strip().splitlines()[-1])
            print(lines[-1], flush=True)
    if arguments.command == "layers":
        print("\n".join(lines))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
