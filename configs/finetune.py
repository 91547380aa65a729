"""A PyTorch checkpoint and a folder of images: trained for it, pruned to 80 %.

    python -m woodfisher_jax.main --config=configs/finetune.py
        --config.model.name=resnet18 --config.init_from=resnet18.pth
        --config.data.dir=FOLDER

FOLDER has train/<class>/*.jpg and val/<class>/*.jpg; without val/ a fifth of each class
is held out. The classes are those of the folder. Where the classifier of the checkpoint
has another number of outputs it starts from random weights, and the network is trained
for 10 epochs before anything is pruned; a network that was trained for these classes is
pruned as it is. Then 4 pruning steps with WoodFisher from 30 to 80 %, two epochs of
training after each of them, and 4 more at the end. The recipe suits convolutional
networks and transformers (``resnet18``, ``vit_tiny``): docs/finetune.md has the steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = ConfigDict()
    config.fit_to_data = True
    config.eval_batch_size = 64
    config.data = ConfigDict({"name": "image_folder"})
    config.model = ConfigDict({"name": "resnet18"})

    config.dense = ConfigDict()
    config.dense.epochs = 10
    config.dense.batch_size = 32
    config.dense.learning_rate = 0.01
    config.dense.weight_decay = 1e-4
    config.dense.schedule = "cosine"
    config.dense.warmup_epochs = 1

    config.train = ConfigDict()
    config.train.epochs = 12
    config.train.batch_size = 32
    config.train.learning_rate = 0.005
    config.train.weight_decay = 1e-4
    config.train.schedule = "cosine"

    config.prune = ConfigDict()
    config.prune.method = "woodfisherblock"
    config.prune.prunable = "kernel$"
    config.prune.target_sparsity = 0.8
    config.prune.initial_sparsity = 0.3
    config.prune.start = 0
    config.prune.end = 6
    config.prune.frequency = 2
    config.prune.num_samples = 50
    config.prune.batch_size = 8
    config.prune.block_size = 2000
    config.prune.damping = 1e-5
    return config
