"""MobileNetV1 on ImageNet, pruned gradually with WoodFisher, as in the paper.

    python -m woodfisher_jax.main --config=configs/mobilenet_v1.py
        --config.init_from=MobileNetV1-Dense-STR.pth

Prunes all 28 layers (4,209,088 weights) to 75.28 % in 6 steps from epoch 4 to 24 and
trains for 76 more. Each pruning step reads 960,000 images for its gradients; ``--plan``
prints its memory and arithmetic. The original ran on 4 GPUs. Training on 128 million
images takes 9 hours at 4,000 images a second (calculated, not measured).

The variants after a colon are the runs of the original's scripts, with the paper's
top-1 (from 72.00 %): ``75`` 70.09 %, ``89`` 63.87 %; by global magnitude
``magnitude_75`` 69.90 %, ``magnitude_89`` 63.01 %. ``smoke`` is the whole network on
420 generated JPEG files at 64 x 64 pixels.
"""

from ml_collections import ConfigDict

VARIANTS = {
    "75": {"target_sparsity": 0.7528},
    "89": {"target_sparsity": 0.89},
    "magnitude_75": {"target_sparsity": 0.7528, "method": "globalmagni"},
    "magnitude_89": {"target_sparsity": 0.89, "method": "globalmagni"},
    "smoke": {},
}


def get_config(variant: str = "75") -> ConfigDict:
    """Returns what differs from the defaults."""
    if variant not in VARIANTS:
        raise ValueError(f"expected one of {', '.join(VARIANTS)}; got {variant!r}")
    config = ConfigDict()
    config.checkpoint_every_epochs = 5
    config.eval_batch_size = 256
    config.data = ConfigDict({"name": "imagenet"})
    config.model = ConfigDict({"name": "mobilenet_v1"})

    config.train = ConfigDict()
    config.train.epochs = 100
    config.train.batch_size = 180 if variant.endswith("89") else 256
    config.train.learning_rate = 0.005
    config.train.weight_decay = 1e-4
    config.train.schedule = "step"
    config.train.decay_rate = 0.92
    config.train.decay_start_epoch = 31
    config.train.decay_every_epochs = 1

    config.prune = ConfigDict()
    config.prune.method = "woodfisherblock"
    config.prune.target_sparsity = 0.7528
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
    config.prune.update(VARIANTS[variant])
    if variant == "smoke":
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Reduces the config to minutes on two cores, with generated images."""
    config.checkpoint_every_epochs = 1
    config.eval_batch_size = 50
    config.data.update({"name": "generated_images", "image_size": 64, "resize": 72})
    config.model.num_classes = 10
    config.train.update({"epochs": 2, "batch_size": 32, "learning_rate": 0.05})
    config.train.decay_start_epoch = 1
    config.prune.update({"initial_sparsity": 0.3, "start": 1, "end": 2, "frequency": 1})
    config.prune.update({"num_samples": 20, "batch_size": 4, "microbatch_size": 40})
    config.prune.update({"block_size": 2000, "loss_samples": 80})
