"""ResNet-50 on ImageNet with two pruners: convolutions to 90 %, classifier to 80 %.

    python -m woodfisher_jax.main --config=configs/imagenet_resnet50_two_pruners.py
        --config.init_from=ResNet50-STR-Dense.pth

The sparsity distribution of Gale et al. (arXiv:1902.09574), for comparison with them:
the first convolution stays dense, 23,445,504 weights of the others and 2,048,000 of the
classifier are pruned, each with a threshold of its own. ``:magni`` after the file takes
magnitudes layer by layer. ImageNet cannot be read yet.
"""

from ml_collections import ConfigDict


def get_config(method: str = "woodfisherblock") -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.checkpoint_every_epochs = 5
    config.eval_batch_size = 256
    config.data = ConfigDict({"name": "imagenet"})
    config.model = ConfigDict({"name": "resnet50"})

    config.train = ConfigDict()
    config.train.epochs = 100
    config.train.batch_size = 256
    config.train.learning_rate = 0.005
    config.train.weight_decay = 1e-4
    config.train.schedule = "step"
    config.train.decay_rate = 0.6
    config.train.decay_start_epoch = 41
    config.train.decay_every_epochs = 6
    config.train.decay_end_epoch = 91

    config.prune = ConfigDict()
    config.prune.method = method
    config.prune.prunable = "^layer"
    config.prune.target_sparsity = 0.9
    config.prune.initial_sparsity = 0.05
    config.prune.start = 1
    config.prune.end = 40
    config.prune.frequency = 5
    config.prune.num_samples = 400
    config.prune.batch_size = 400
    config.prune.block_size = 2000
    config.prune.damping = 1e-5
    config.prune.augment = True
    config.prune.loss_samples = 10_000

    config.prune_2 = ConfigDict()
    config.prune_2.prunable = "^fc/kernel"
    config.prune_2.target_sparsity = 0.8
    return config
