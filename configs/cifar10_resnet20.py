"""ResNet-20 on CIFAR-10, pruned gradually to 90 % with WoodFisher.

    python -m woodfisher_jax.main --config=configs/cifar10_resnet20.py

trains the dense network first. To start from the original's checkpoint:

    python -m woodfisher_jax.main --config=configs/cifar10_resnet20.py
        --config.init_from=resnet20_cifar10.pth.tar

Prunes the 18 convolutions of the three groups of blocks (267,264 weights); the first
convolution, the shortcuts and the classifier stay dense, as in the original. On 2 CPU
cores, with another job running, an epoch takes 8 minutes and a pruning step one to two;
dense 91.43 % from the checkpoint.

The variant ``:gradual_95`` prunes to 95 % in 5 steps over 4 epochs and trains for 2
more, with WoodFisher and then with global magnitude on the same schedule. From that
checkpoint it takes about an hour on 2 idle CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = ("gradual_95",)


def get_config(variant: str = "") -> ConfigDict:
    """Returns what differs from the defaults."""
    if variant not in ("", *VARIANTS):
        raise ValueError(f"expected one of {', '.join(VARIANTS)}; got {variant!r}")
    config = ConfigDict()
    config.data = ConfigDict({"name": "cifar10"})
    config.model = ConfigDict({"name": "resnet20"})

    config.dense = ConfigDict()
    config.dense.epochs = 160
    config.dense.batch_size = 128
    config.dense.learning_rate = 0.1
    config.dense.weight_decay = 1e-4
    config.dense.schedule = "step"
    config.dense.decay_start_epoch = 80
    config.dense.decay_every_epochs = 40

    config.train = ConfigDict()
    config.train.epochs = 24
    config.train.batch_size = 128
    config.train.learning_rate = 0.01
    config.train.weight_decay = 1e-4
    config.train.schedule = "step"
    config.train.decay_start_epoch = 18
    config.train.decay_every_epochs = 3

    config.prune = ConfigDict()
    config.prune.method = "woodfisherblock"
    config.prune.prunable = r"layer\d/block\d+/conv\d/kernel"
    config.prune.target_sparsity = 0.9
    config.prune.initial_sparsity = 0.2
    config.prune.start = 0
    config.prune.end = 16
    config.prune.frequency = 2
    config.prune.num_samples = 1000
    config.prune.damping = 1e-5
    if variant == "gradual_95":
        config.compare_with = ("globalmagni",)
        config.train.epochs = 6
        config.train.decay_start_epoch = 5
        config.train.decay_every_epochs = 1
        config.prune.target_sparsity = 0.95
        config.prune.initial_sparsity = 0.5
        config.prune.end = 4
        config.prune.frequency = 1
    return config
