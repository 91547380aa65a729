"""The original's MLP 784-40-20-10 on MNIST, pruned gradually to 95 % with WoodFisher.

    python -m woodfisher_jax.main --config=configs/mnist_mlpnet.py

trains the dense network first, and repeats the run with global magnitude: dense
97.08 %, final 96.50 % (WoodFisher) and 96.46 % (magnitude). To prune the original's
checkpoint in one step:

    python -m woodfisher_jax.main --config=configs/mnist_mlpnet.py
        --config.init_from=mnist_25_epoch_93.97.ckpt --config.prune.one_shot=True

takes 15 s on 2 CPU cores: dense 93.97 %, pruned 84.40 % (seed 0).

The variant ``:matched`` reaches the same sparsity in nine steps that match the outputs
of the dense network, without labels and without training: 92.79 % from that checkpoint
(seed 0).
"""

from ml_collections import ConfigDict

VARIANTS = ("matched",)


def get_config(variant: str = "") -> ConfigDict:
    """Returns what differs from the defaults."""
    if variant not in ("", *VARIANTS):
        raise ValueError(f"expected one of {', '.join(VARIANTS)}; got {variant!r}")
    config = ConfigDict()
    config.data = ConfigDict({"name": "mnist"})
    config.model = ConfigDict({"name": "mlp", "hidden": (40, 20)})

    config.dense = ConfigDict()
    config.dense.epochs = 10
    config.dense.batch_size = 64
    config.dense.learning_rate = 0.05
    config.dense.schedule = "step"
    config.dense.decay_rate = 0.5
    config.dense.decay_start_epoch = 4
    config.dense.decay_every_epochs = 2

    config.train = ConfigDict()
    config.train.epochs = 8
    config.train.batch_size = 64
    config.train.learning_rate = 0.03
    config.train.schedule = "step"
    config.train.decay_rate = 0.5
    config.train.decay_start_epoch = 5

    config.prune = ConfigDict()
    config.prune.method = "woodfisherblock"
    config.prune.target_sparsity = 0.95
    config.prune.initial_sparsity = 0.3
    config.prune.start = 0
    config.prune.end = 5
    config.prune.frequency = 1
    config.prune.num_samples = 100
    config.prune.damping = 1e-5
    if not variant:
        config.compare_with = ("globalmagni",)
    if variant == "matched":
        config.train.epochs = 0
        config.prune.method = "woodtaylor"
        config.prune.update = "joint"
        config.prune.auto_damping = True
        config.prune.match = "outputs"
        config.prune.match_metric = "softmax"
        config.prune.num_samples = 2000
        config.prune.initial_sparsity = 0.5
        config.prune.repeated_one_shot = True
        config.prune.end = 8
    return config
