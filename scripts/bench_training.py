"""Images a second of ResNet-20 on CIFAR-10 in training, beside a plain PyTorch loop.

    python scripts/bench_training.py [--data_dir=FOLDER] [--steps=20] [--rounds=5]

Both train the same weights on the same augmented batches, in turn, some steps a round;
without PyTorch only this library is timed. Reading and augmenting a batch is part of a
step in both.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_pruning import processor

from woodfisher_jax import data, models
from woodfisher_jax.report import environment
from woodfisher_jax.training.network import optimizer
from woodfisher_jax.training.network.train_step import TrainState, copied, train_step
from woodfisher_jax.weights import state_dicts

BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.01, 0.9, 1e-4

Batches = Iterator[dict[str, np.ndarray]]
Loop = Callable[[Batches], list[float]]


def jax_loop(dtype: str | None, variables: Any, model: Any) -> Loop:
    """The training of a run: the next batch is read while a step runs."""
    tx = optimizer.make_optimizer("sgd", lambda step: LEARNING_RATE, WEIGHT_DECAY)
    params = variables["params"]
    # The other loops start from the same weights.
    state = copied(TrainState(params, variables["batch_stats"], {}, tx.init(params)))
    model = model.clone(dtype=dtype)

    def loop(batches: Batches) -> list[float]:
        nonlocal state
        losses: list[jax.Array] = []
        for batch in batches:
            state, metrics = train_step(
                state,
                batch,
                np.zeros(1, np.float32),
                model=model,
                tx=tx,
                label_smoothing=0.0,
            )
            losses.append(metrics.loss)
            jax.block_until_ready(losses[-2:-1])
        return [float(loss) for loss in losses]

    return loop


def torch_loop(variables: Any) -> Loop:
    """The loop of PyTorch's own examples."""
    # The definitions that the tests compare the models with.
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import torch
    from torch_models import cifar_resnet

    network = cifar_resnet(20)
    weights = state_dicts.to_state_dict(variables)
    network.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
    network.to(memory_format=torch.channels_last)
    network.train()
    step = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    judge = torch.nn.CrossEntropyLoss()

    def loop(batches: Batches) -> list[float]:
        losses = []
        for batch in batches:
            # Channels last, as they lie in memory.
            images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
            loss = judge(network(images), torch.from_numpy(batch["label"]).long())
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(float(loss.detach()))
        return losses

    return loop


def compared(
    loops: dict[str, Loop], dataset: Any, steps: int, rounds: int
) -> dict[str, Any]:
    """Median and range of images a second, and the losses of the first steps."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    first: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        for name, loop in loops.items():
            batches = data.epoch_batches(
                dataset,
                seed=0,
                epoch=number + 1,
                start=0,
                stop=3 if number < 0 else steps,
                batch_size=BATCH_SIZE,
            )
            start = time.perf_counter()
            losses = loop(batches)
            seconds = time.perf_counter() - start
            if number < 0:  # It compiles.
                first[name] = losses
            else:
                found[name].append(BATCH_SIZE * steps / seconds)
    return {
        name: {
            "images_a_second": round(statistics.median(rates), 1),
            "lowest": round(min(rates), 1),
            "highest": round(max(rates), 1),
            "first_losses": [round(loss, 4) for loss in first[name]],
        }
        for name, rates in found.items()
    }


def main() -> None:
    """Runs the loops in turn and prints a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", help="folder of TFDS-prepared CIFAR-10")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    dataset = data.load("cifar10", data_dir=arguments.data_dir)
    model = models.build_model("resnet20")
    image = np.zeros((1, *dataset.image_shape), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    loops = {"woodfisher_jax": jax_loop(None, variables, model)}
    if jax.default_backend() != "cpu":
        loops["woodfisher_jax, bfloat16"] = jax_loop("bfloat16", variables, model)
    if importlib.util.find_spec("torch"):
        loops["PyTorch"] = torch_loop(variables)
    found = compared(loops, dataset, arguments.steps, arguments.rounds)
    for name, figures in found.items():
        print(json.dumps({"loop": name, **figures}))
    print(json.dumps({"processor": processor(), **environment.environment()}))


if __name__ == "__main__":
    main()
