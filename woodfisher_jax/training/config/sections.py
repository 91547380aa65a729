"""The config of a run: frozen dataclasses whose fields are options.

A config file states only what differs from their defaults. A duration has its unit in
its name, or in ``PruneConfig.unit``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from woodfisher_jax.curvature.fisher import AUTO
from woodfisher_jax.data import ImageOptions
from woodfisher_jax.methods import METHODS
from woodfisher_jax.options import Options, option
from woodfisher_jax.rows.projections import METRICS
from woodfisher_jax.schedules import Stage, gradual, one_shot
from woodfisher_jax.training.config.step_options import changed, step_fields
from woodfisher_jax.training.network.optimizer import LR_SCHEDULES, OPTIMIZERS

DTYPES = ("float32", "bfloat16")
"""Precisions of training."""

LONGEST = 1_000_000
"""Of durations in epochs or seconds."""

MATCHES = ("none", "outputs", "labels")
"""The targets of a run's steps: none, the dense network's outputs, or the labels."""


@dataclasses.dataclass(frozen=True)
class DataConfig(ImageOptions):
    """Where examples come from, and how images in files are read."""

    name: str = option(
        "digits",
        "A data set in memory: digits, mnist, cifar10, cifar100, cifar100_folder; or "
        "in files: imagenet, imagenet_folder, imagenette, imagenette_folder, "
        "image_folder, generated_images, generated_records.",
    )
    dir: str | None = option(
        None,
        "Folder of TFDS-prepared data; default the environment variable TFDS_DATA_DIR, "
        "or TFDS's own default. For data sets in folders the one with train and val; "
        "image_folder without val holds a fifth of the images out.",
    )
    augment: bool = option(
        True, "Random crops and flips in training, where the data set has them."
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Options):
    """Which network.

    Attributes:
        settings: Its keyword arguments; in a config file any further key of ``model``.
    """

    name: str = option("mlp", "A name of ``woodfisher_jax.models.MODELS``.")
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Options):
    """Which optimizer.

    Attributes:
        settings: Its keyword arguments in Optax, such as momentum (0.9 for sgd unless
            given), nesterov, b1 or eps; in a config file any further key of
            ``optimizer``.
    """

    name: str = option("sgd", "An optimizer of Optax.", choices=OPTIMIZERS)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """Training for a number of epochs.

    Attributes:
        optimizer: See :class:`OptimizerConfig`.
    """

    epochs: int = option(0, "Passes over the training set.", least=0, most=LONGEST)
    batch_size: int = option(64, "Examples a step.", least=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: float = option(
        0.01, "At the start; for one_cycle the highest.", above=0
    )
    weight_decay: float = option(
        0.0,
        "On all parameters: the optimizer's own where it has one (adamw, lamb, lion), "
        "else added to the gradient.",
        least=0,
    )
    schedule: str = option(
        "constant",
        "constant; step (times decay_rate at decay_start_epoch and each "
        "decay_every_epochs after); multistep (times decay_rate at decay_at_epochs); "
        "exponential (as step, but smoothly, from decay_start_epoch); linear and "
        "cosine (to final_learning_rate over all epochs); cosine_restarts and cyclic "
        "(to final_learning_rate and back in each decay_every_epochs); one_cycle (up "
        "and down once over all epochs).",
        choices=LR_SCHEDULES,
    )
    decay_rate: float = option(
        0.1, "Factor of step, multistep and exponential.", above=0
    )
    decay_start_epoch: int = option(
        1,
        "First epoch at the lower rate (step), or where it starts.",
        least=0,
        most=LONGEST,
    )
    decay_every_epochs: int = option(
        1, "Epochs between two factors, or of a period.", least=1, most=LONGEST
    )
    decay_end_epoch: int | None = option(
        None,
        "Last epoch that may begin with a factor (step), or where the decay ends "
        "(exponential); default none.",
        least=0,
        most=LONGEST,
    )
    decay_at_epochs: tuple[int, ...] = option(
        (), "Epochs that begin with a factor, of multistep.", least=0
    )
    final_learning_rate: float = option(
        0.0, "Lowest of linear, cosine, cosine_restarts and cyclic.", least=0
    )
    warmup_epochs: int = option(
        0,
        "Over these the schedule's rate is multiplied by a factor that grows to 1 in "
        "equal steps.",
        least=0,
        most=LONGEST,
    )
    label_smoothing: float = option(
        0.0, "Share of the target that is spread over all classes.", least=0, below=1
    )
    weight_decay_after_pruning: bool = option(
        True, "Whether weight decay stays on after the last pruning step."
    )
    weight_decay_kernels_only: bool = option(
        False, "Leave biases, norms and embeddings out of it."
    )
    accumulation_steps: int = option(
        1,
        "Parts of a batch whose gradients are formed in turn, where the memory does "
        "not hold them together; each has its own batch-norm statistics.",
        least=1,
    )
    average_decay: float = option(
        0.0,
        "Of an exponential moving average of weights and statistics, such as 0.9999; "
        "the average is evaluated, pruned and saved as the result. 0 for none.",
        least=0,
        below=1,
    )
    dtype: str = option(
        "float32",
        "bfloat16 for mixed precision: activations and products of training alone; "
        "weights, statistics, logits, evaluation and the gradients of pruning are "
        "float32.",
        choices=DTYPES,
    )


@dataclasses.dataclass(frozen=True)
class PruneConfig(Options):
    """When, how far and by which method to prune.

    Attributes:
        options: Options of the pruning step that differ from their defaults: those of
            the method, of :class:`~woodfisher_jax.selection.goal.Goal` and of
            :class:`~woodfisher_jax.rows.compute.Compute`. In a config file they are
            fields of the section like all others.
    """

    method: str = option("woodfisherblock", "A name of ``woodfisher_jax.METHODS``.")
    target_sparsity: float = option(
        0.9,
        "Of the prunable weights at the end. With flops_target the schedule is one of "
        "multiply-accumulates, after the step to initial_sparsity.",
        least=0,
        below=1,
    )
    initial_sparsity: float = option(
        0.0, "At the first step; 0 leaves the step at start out.", least=0, below=1
    )
    one_shot: bool = option(
        False,
        "Prune once, straight to the target, and do not retrain. To retrain, or to "
        "train for n epochs before, set start = end = n instead.",
    )
    repeated_one_shot: bool = option(
        False,
        "Take all steps of the schedule in turn at start, without training in between.",
    )
    from_dense: bool = option(
        False,
        "Each step of repeated_one_shot starts from the weights before the first one, "
        "not from those of the last.",
    )
    at_launch: bool = option(
        False, "A step to initial_sparsity at time 0 too, before start."
    )
    unit: str = option(
        "epochs",
        "What start, end and frequency count, from the start of train.",
        choices=("epochs", "steps"),
    )
    start: int = option(0, "Of the schedule.", least=0)
    end: int = option(0, "Of the schedule; the target is reached here.", least=0)
    frequency: int = option(1, "Time between pruning steps.", least=1)
    degree: float = option(3.0, "Exponent of the schedule; 3 is the paper's.", above=0)
    num_samples: int = option(100, "N, gradients in the estimate.", least=1)
    auto_damping: bool = option(False, "The same as damping=auto.")
    damping_search_samples: int = option(
        0,
        "Training examples, none of the Fisher's, by the errors on which the damping "
        "is searched in steps of ten from the one above; some thousands, or 0 for no "
        "search.",
        least=0,
    )
    match: str = option(
        "none",
        "What a step of woodtaylor brings the network's outputs to: outputs, those of "
        "the network before the first step, without any labels; labels, by the loss "
        "of batch_size examples a row, which is training; none, the gradients are "
        "those of the loss.",
        choices=MATCHES,
    )
    match_metric: str = option(
        "identity", "Of the distance to these outputs.", choices=METRICS
    )
    damping_plus_weight_decay: bool = option(
        False, "Add weight_decay of train to the damping."
    )
    mean_samples: int | None = option(
        None,
        "Examples for the mean gradient of woodtaylor; default the Fisher samples, "
        "which also come first.",
        least=1,
    )
    memory_limit_gb: float | None = option(
        None,
        "Most memory for a pruning step to take, in 1e9 bytes; default what is free.",
        least=1e-9,
    )
    prunable: str | None = option(
        None,
        "Regular expression on parameter paths; default the weights of dense layers "
        "and convolutions.",
    )
    prune_biases: bool = option(
        False, "Prune the biases of the layers that are pruned as well."
    )
    label_smoothing: float = option(0.0, "In the Fisher's loss.", least=0, below=1)
    true_fisher: bool = option(
        False, "Draw the labels of Fisher samples from the model."
    )
    augment: bool = option(False, "Augment the Fisher samples as in training.")
    redraw_samples: bool = option(
        True,
        "Draw new Fisher samples at each pruning step and recomputation; else always "
        "the same.",
    )
    batch_norm_samples: int = option(
        0,
        "Training images from which batch-norm statistics are estimated again after "
        "each pruning step; 0 leaves them as they are.",
        least=0,
    )
    batch_norm_augment: bool = option(True, "Augment those images as in training.")
    loss_samples: int | None = option(
        None,
        "Training examples that the loss is measured on before and after each pruning "
        "step, the Fisher samples first; default as many as those, 0 for none.",
        least=0,
    )
    diagnostics: bool = option(
        False,
        "Predicted loss and its increase, agreement with global magnitude and trace of "
        "the Fisher a layer, of each pruning step in results.json.",
    )
    loss_path_steps: int = option(
        0,
        "Steps from the old weights to the new ones at which the loss is measured and "
        "plotted, beside its quadratic model; 0 for no plot.",
        least=0,
        most=1000,
    )
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the fields and the options one by one.

        Options of a method that is not in METHODS stay as they are: the config of a
        saved run can be read where its method is not.

        Raises:
            OptionError: Naming the field, what was expected and what came.
        """
        super().__post_init__()
        options = dict(self.options)
        if options.get("damping") == AUTO:
            del options["damping"]
            object.__setattr__(self, "auto_damping", True)
        if self.method in METHODS:
            options = changed(self.method, options)
        object.__setattr__(self, "options", options)

    def value_of(self, name: str) -> Any:
        """The value of an option of the pruning step."""
        default = step_fields(self.method)[name].default
        return self.options.get(name, default)

    @property
    def num_examples(self) -> int:
        """N · m, examples in the gradients of a step."""
        return self.num_samples * int(self.value_of("batch_size"))

    @property
    def keeps_dense(self) -> bool:
        """Whether the network before the first step is kept."""
        return self.from_dense or self.match == "outputs"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The pruning steps, in ``unit`` since the start of ``train``."""
        if self.one_shot:
            return one_shot(self.target_sparsity)
        stages = gradual(
            self.start,
            self.end,
            self.frequency,
            self.initial_sparsity,
            self.target_sparsity,
            self.degree,
        )
        if self.repeated_one_shot:
            return tuple(Stage(self.start, stage.sparsity) for stage in stages)
        if self.at_launch and self.start > 0:
            # The step at ``start`` would prune to the same level once more.
            later = tuple(stage for stage in stages if stage.time > self.start)
            return (Stage(0, self.initial_sparsity), *later)
        return stages


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Options):
    """How the processes of a run find one another."""

    coordinator: str | None = option(
        None,
        "host:port of process 0; auto on a TPU pod, under Slurm or Open MPI. Default a "
        "run of one process.",
    )
    num_processes: int | None = option(
        None, "How many there are; auto may leave it out.", least=1
    )
    process_id: int | None = option(
        None,
        "Which one this is, from 0; auto may leave it out. The one field in which the "
        "processes differ.",
        least=0,
    )
    start_timeout_seconds: int = option(
        300, "How long to wait for the others at the start.", least=1, most=LONGEST
    )
    heartbeat_timeout_seconds: int = option(
        100,
        "After how long a silent process is taken for dead, which ends the others.",
        least=1,
        most=LONGEST,
    )


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """A whole run.

    Attributes:
        distributed: See :class:`DistributedConfig`.
        data: See :class:`DataConfig`.
        model: See :class:`ModelConfig`.
        dense: Training of the dense network, unless ``init_from`` is given and has a
            classifier of the right size.
        train: Training during and after pruning.
        prune: See :class:`PruneConfig`.
        also_prune: Further pruners of other weights, each with its own method, target
            and schedule; in a config file the sections ``prune_2``, ``prune_3``, ...,
            which state what differs from ``prune``.
    """

    seed: int = option(
        0,
        "Of the initial weights, the order of examples and the Fisher samples.",
        least=0,
        most=2**32 - 1,
    )
    init_from: str | None = option(
        None,
        "A PyTorch checkpoint (or .npz, .safetensors) of the dense network, or the "
        "folder of another run; it takes the place of training it. Layers with fewer "
        "outputs than model says become widths of model.",
    )
    fit_to_data: bool = option(
        False,
        "Take num_classes of model from the data set; where the classifier of "
        "init_from has another number of outputs, start it from random weights and "
        "train as dense says; lower batch sizes and sample counts to the training "
        "examples there are. The log states each. Without it what does not fit is "
        "refused.",
    )
    compare_with: tuple[str, ...] = option(
        (),
        "Methods to run after the main one on the same schedule, with the same options "
        "as far as they have them.",
    )
    checkpoint_every_epochs: int = option(
        1, "Besides a checkpoint after every pruning step.", least=1, most=LONGEST
    )
    eval_batch_size: int = option(1000, "Examples a step of evaluation.", least=1)
    compile_cache_dir: str | None = option(
        "auto",
        "Folder for compiled programs, which the next run then need not compile again. "
        "auto takes JAX_COMPILATION_CACHE_DIR or a folder of the user's cache; None "
        "keeps none.",
    )
    distributed: DistributedConfig = DistributedConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    dense: TrainConfig = TrainConfig()
    train: TrainConfig = TrainConfig()
    prune: PruneConfig = PruneConfig()
    also_prune: tuple[PruneConfig, ...] = ()

    @property
    def pruners(self) -> dict[str, PruneConfig]:
        """All pruners by the name of their section."""
        further = {f"prune_{n}": p for n, p in enumerate(self.also_prune, start=2)}
        return {"prune": self.prune, **further}
