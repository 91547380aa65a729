"""The original's small MNIST run: two epochs, one pruning step to 90 %, one epoch.

    python -m woodfisher_jax.main --config=configs/mnist_mlpnet_original.py

It has the hyper-parameters of mlpnet_mnist_config_one_shot_woodburry_fisher.yaml,
prunes the same single layer and starts from random weights too; ``scripts/sweep.py
mlpnet_oneshot`` prunes all three layers. 22 s on 2 CPU cores: 87.23 % after two epochs,
pruned 23.80 %, final 85.94 % (seed 0).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "mnist"})
    config.model = ConfigDict({"name": "mlp", "hidden": (40, 20)})

    config.train = ConfigDict()
    config.train.epochs = 3
    config.train.batch_size = 64
    config.train.learning_rate = 0.001
    config.train.optimizer = ConfigDict({"momentum": 0.5})

    config.prune = ConfigDict()
    config.prune.method = "woodfisher"
    config.prune.prunable = "fc2/kernel"
    config.prune.target_sparsity = 0.9
    config.prune.start = 0
    config.prune.end = 2
    config.prune.frequency = 2
    config.prune.num_samples = 8000
    config.prune.damping = 1e-5
    return config
