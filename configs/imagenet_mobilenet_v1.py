"""MobileNetV1 on ImageNet, pruned gradually with WoodFisher, as in the paper.

    python -m woodfisher_jax.main --config=configs/imagenet_mobilenet_v1.py:0.89
        --config.init_from=MobileNetV1-Dense-STR.pth

After the colon 0.7528 or 0.89; ``--config.prune.method=globalmagni`` compares. Prunes
all 28 layers (4,209,088 weights) in 6 steps from epoch 4 to 24 and trains for 76 more.
The paper: 70.09 % top-1 at 75.28 %, 63.87 % at 89 %, from 72.00 %. ImageNet cannot be
read yet.
"""

from ml_collections import ConfigDict


def get_config(sparsity: str = "0.7528") -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.checkpoint_every_epochs = 5
    config.eval_batch_size = 256
    config.data = ConfigDict({"name": "imagenet"})
    config.model = ConfigDict({"name": "mobilenet_v1"})

    config.train = ConfigDict()
    config.train.epochs = 100
    config.train.batch_size = 180 if sparsity == "0.89" else 256
    config.train.learning_rate = 0.005
    config.train.weight_decay = 1e-4
    config.train.schedule = "step"
    config.train.decay_rate = 0.92
    config.train.decay_start_epoch = 31
    config.train.decay_every_epochs = 1

    config.prune = ConfigDict()
    config.prune.method = "woodfisherblock"
    config.prune.target_sparsity = float(sparsity)
    config.prune.initial_sparsity = 0.05
    config.prune.start = 4
    config.prune.end = 24
    config.prune.frequency = 4
    config.prune.num_samples = 400
    config.prune.batch_size = 2400
    config.prune.microbatch_size = 800
    config.prune.block_size = 10_000
    config.prune.damping = 1e-5
    config.prune.augment = True
    config.prune.loss_samples = 10_000
    return config
