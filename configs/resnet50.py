"""ResNet-50 on ImageNet, pruned gradually with WoodFisher to 90 %, as in the paper.

    python -m woodfisher_jax.main --config=configs/resnet50.py
        --config.init_from=ResNet50-STR-Dense.pth

Prunes all 54 layers (25,502,912 weights) in 9 steps over 40 epochs and trains for 60
more; without ``init_from`` it trains the dense network for 100 epochs first. It
reads ImageNet as TFDS prepares it; for a folder with train/<class>/*.JPEG and val/ add
``--config.data.name=imagenet_folder --config.data.dir=FOLDER``. With
``--config.train.dtype=bfloat16`` it trains in mixed precision.

Hardware: the original ran on 4 GPUs with 45 images each. Any number of devices that
divides the batch size of 180 gives the same run; with others the error names the
nearest batch size. Training on 128 million images takes 14 hours at 2,500 images a
second (calculated, not measured). Each pruning step reads 160,000 images for its
gradients; ``--plan`` prints its memory and arithmetic.

The variants after a colon are the runs of the original's scripts, with their
hyper-parameters and the paper's top-1 in %:

=====================  ==============================================  ==========
variant                what differs                                    top-1
=====================  ==============================================  ==========
(none)                 dense, ``ResNet50-STR-Dense.pth``               77.01
80, 90, 95, 98         WoodFisher to that sparsity                     76.73, 75.26,
                                                                       72.16, 65.47
magnitude_80, ...      global magnitude with the same schedule         76.60, 75.09,
                                                                       71.65, 64.17
flops_power            saliencies divided by MACs to the power 0.30    not known
flops_335              down to 335 M multiply-accumulates              not known
two_pruners            convolutions to 90 %, classifier to 80 %, the   not known
                       first convolution dense (arXiv:1902.09574)
two_pruners_magnitude  the same by magnitude, layer by layer           not known
one_shot               one step, thresholds a layer, no training; a    see below
                       sweep over sparsities is ``scripts/sweep.py
                       resnet50_layerwise``
smoke                  an ImageNet-shaped set of 420 generated JPEG    none
                       files at 48 x 48 pixels
=====================  ==============================================  ==========

One-shot, layer-wise, the paper's top-5: 92.14 % at 30 %, 90.57 % at 50 %, 67.13 % at
65 %, from 92.86 %. The smoke run is the whole ResNet-50 from random weights: three
epochs of ten steps, with pruning steps to 50 and 90 % between them; 4 min 24 s and
4.8 GB on 2 CPU cores.
``--config.data.name=generated_records`` reads the same images as TFDS keeps them.
"""

from ml_collections import ConfigDict

SPARSITIES = {
    "80": {
        "method": "woodfisherblockdynamic",
        "target_sparsity": 0.8,
        "scale_update": 0.9,
    },
    "90": {"target_sparsity": 0.9},
    "95": {"target_sparsity": 0.95},
    "98": {"target_sparsity": 0.98, "block_size": 1000},
}

FLOPS_AWARE = {
    "target_sparsity": 0.9023,
    "flops_power": 0.3,
    "flops_per_parameter": True,
}

VARIANTS = {
    **SPARSITIES,
    **{
        f"magnitude_{name}": {
            "method": "globalmagni",
            "target_sparsity": changes["target_sparsity"],
        }
        for name, changes in SPARSITIES.items()
    },
    "flops_power": FLOPS_AWARE,
    "flops_335": {
        **FLOPS_AWARE,
        "method": "woodfisherblock_flops",
        "flops_target": 335.0,
    },
    "two_pruners": {"prunable": "^layer"},
    "two_pruners_magnitude": {"prunable": "^layer", "method": "magni"},
    "one_shot": {"one_shot": True, "scope": "layer", "target_sparsity": 0.5},
    "smoke": {},
}


def get_config(variant: str = "90") -> ConfigDict:
    """Returns what differs from the defaults."""
    if variant not in VARIANTS:
        raise ValueError(f"expected one of {', '.join(VARIANTS)}; got {variant!r}")
    config = ConfigDict()
    config.checkpoint_every_epochs = 5
    config.eval_batch_size = 256
    config.data = ConfigDict({"name": "imagenet"})
    config.model = ConfigDict({"name": "resnet50"})

    # The recipe of the STR checkpoint, for runs without init_from.
    config.dense = ConfigDict()
    config.dense.epochs = 100
    config.dense.batch_size = 256
    config.dense.learning_rate = 0.256
    config.dense.optimizer = ConfigDict({"name": "sgd", "momentum": 0.875})
    config.dense.weight_decay = 2.0**-15
    config.dense.schedule = "cosine"
    config.dense.warmup_epochs = 5
    config.dense.label_smoothing = 0.1

    config.train = ConfigDict()
    config.train.epochs = 100
    large = ("80", "magnitude_80", "two_pruners", "two_pruners_magnitude", "one_shot")
    config.train.batch_size = 256 if variant in large else 180
    config.train.learning_rate = 0.005
    config.train.weight_decay = 1e-4
    config.train.weight_decay_after_pruning = not variant.startswith("flops")
    config.train.schedule = "step"
    config.train.decay_rate = 0.6
    config.train.decay_start_epoch = 41
    config.train.decay_every_epochs = 6
    config.train.decay_end_epoch = 91

    config.prune = ConfigDict()
    config.prune.method = "woodfisherblock"
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
    config.prune.update(VARIANTS[variant])

    if variant.startswith("two_pruners"):
        config.prune_2 = ConfigDict()
        config.prune_2.prunable = "^fc/kernel"
        config.prune_2.target_sparsity = 0.8
    if variant == "smoke":
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Reduces the config to minutes on two cores, with generated images."""
    config.checkpoint_every_epochs = 1
    config.eval_batch_size = 50
    config.data.update({"name": "generated_images", "image_size": 48, "resize": 54})
    config.model.num_classes = 10

    config.dense.epochs = 0
    config.train.update({"epochs": 3, "batch_size": 32, "learning_rate": 0.01})
    config.train.update({"decay_start_epoch": 2, "decay_every_epochs": 1})

    config.prune.update({"initial_sparsity": 0.5, "start": 1, "end": 2, "frequency": 1})
    config.prune.update({"num_samples": 8, "batch_size": 4, "loss_samples": 32})
    config.prune.block_size = 20_000
