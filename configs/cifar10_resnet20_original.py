"""The original's ResNet-20 run on CIFAR-10: one convolution, gradually to 90 %.

    python -m woodfisher_jax.main --config=configs/cifar10_resnet20_original.py
        --config.init_from=resnet20_cifar10.pth.tar

The hyper-parameters of resnet20_woodfisher.yaml: steps after 2, 4, ..., 22 epochs. The
layer has 9,216 weights. On 2 CPU cores, with another job running, an epoch takes 8
minutes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "cifar10"})
    config.model = ConfigDict({"name": "resnet20"})

    config.train = ConfigDict()
    config.train.epochs = 23
    config.train.batch_size = 64
    config.train.learning_rate = 0.001
    config.train.weight_decay = 1e-4
    config.train.schedule = "step"
    config.train.decay_start_epoch = 31
    config.train.decay_every_epochs = 5
    config.train.decay_end_epoch = 51

    config.prune = ConfigDict()
    config.prune.method = "woodfisher"
    config.prune.prunable = "layer2/block2/conv2/kernel"
    config.prune.target_sparsity = 0.9
    config.prune.start = 0
    config.prune.end = 22
    config.prune.frequency = 2
    config.prune.num_samples = 1000
    config.prune.damping = 1e-5
    config.prune.augment = True
    return config
