"""What a run is: frozen dataclasses with their defaults.

A config file states only what differs from these. A duration carries its unit in its
name, or in ``PruneConfig.unit``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from woodfisher_jax.data import ImageOptions
from woodfisher_jax.schedules import Stage, gradual, one_shot


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from.

    Attributes:
        name: A data set in memory: digits, mnist, cifar10, cifar100, cifar100_folder;
            or in files: imagenet, imagenet_folder, imagenette, imagenette_folder,
            image_folder, generated_images, generated_records.
        dir: Folder of TFDS-prepared data; default the environment variable
            TFDS_DATA_DIR, or TFDS's own default. For data sets in folders the one that
            holds train and val.
        augment: Random crops and flips in training, where the data set has them.
        image_size: Side of the square that the model sees, in pixels; like all that
            follow, of data sets in files.
        resize: Shorter side of a test image before its middle is cut out.
        autoaugment: AutoAugment of training images, besides crops and flips.
        workers: Processes that decode images; 0 for threads, one a core.
        prefetch: Batches made ready ahead.
        max_bad_images: Files of a split that may be unreadable and are left out.
    """

    name: str = "digits"
    dir: str | None = None
    augment: bool = True
    image_size: int = 224
    resize: int = 256
    autoaugment: bool = False
    workers: int = 0
    prefetch: int = 2
    max_bad_images: int = 10

    @property
    def image_options(self) -> ImageOptions:
        """How images in files are read."""
        return ImageOptions(
            image_size=self.image_size,
            resize=self.resize,
            autoaugment=self.autoaugment,
            workers=self.workers,
            prefetch=self.prefetch,
            max_bad_images=self.max_bad_images,
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: A row of ``woodfisher_jax.models.MODELS``.
        settings: Its keyword arguments; in a config file any further key of ``model``.
    """

    name: str = "mlp"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer.

    Attributes:
        name: One of ``woodfisher_jax.training.optimizer.OPTIMIZERS``: sgd, adam, adamw,
            rmsprop and others of Optax.
        settings: Its keyword arguments in Optax, such as momentum (0.9 for sgd unless
            given), nesterov, b1 or eps; in a config file any further key of
            ``optimizer``.
    """

    name: str = "sgd"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training for a number of epochs.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Examples a step.
        optimizer: See :class:`OptimizerConfig`.
        learning_rate: At the start; for one_cycle the highest.
        weight_decay: On all parameters: the optimizer's own where it has one (adamw,
            lamb, lion), else added to the gradient.
        schedule: constant; step (times decay_rate at decay_start_epoch and each
            decay_every_epochs after); multistep (times decay_rate at decay_at_epochs);
            exponential (as step, but smoothly, from decay_start_epoch); linear and
            cosine (to final_learning_rate over all epochs); cosine_restarts and cyclic
            (to final_learning_rate and back in each decay_every_epochs); one_cycle (up
            and down once over all epochs).
        decay_rate: Factor of step, multistep and exponential.
        decay_start_epoch: First epoch at the lower rate (step), or where it starts.
        decay_every_epochs: Epochs between two factors, or of a period.
        decay_end_epoch: Last epoch that may begin with a factor (step), or where the
            decay ends (exponential); default none.
        decay_at_epochs: Epochs that begin with a factor, of multistep.
        final_learning_rate: Lowest of linear, cosine, cosine_restarts and cyclic.
        warmup_epochs: Over these the schedule's rate is multiplied by a factor that
            grows to 1 in equal steps.
        label_smoothing: Share of the target that is spread over all classes, [0, 1).
        weight_decay_after_pruning: Whether weight decay stays on after the last pruning
            step.
        weight_decay_kernels_only: Leave biases, norms and embeddings out of it.
        accumulation_steps: Parts of a batch whose gradients are formed in turn, where
            the memory does not hold them together; each has its own batch-norm
            statistics.
        average_decay: Of an exponential moving average of weights and statistics, such
            as 0.9999, [0, 1); the average is what is evaluated, pruned and saved as the
            result. 0 for none.
        dtype: float32, or bfloat16 for mixed precision: activations and products of
            training alone; weights, statistics, logits, evaluation and the gradients
            of pruning are float32.
    """

    epochs: int = 0
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    schedule: str = "constant"
    decay_rate: float = 0.1
    decay_start_epoch: int = 1
    decay_every_epochs: int = 1
    decay_end_epoch: int | None = None
    decay_at_epochs: tuple[int, ...] = ()
    final_learning_rate: float = 0.0
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    weight_decay_after_pruning: bool = True
    weight_decay_kernels_only: bool = False
    accumulation_steps: int = 1
    average_decay: float = 0.0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """When, how far and by which method to prune.

    Attributes:
        method: A row of ``woodfisher_jax.METHODS``.
        target_sparsity: Of the prunable weights at the end, [0, 1).
        flops_target: Millions of multiply-accumulates of one image at the end, of all
            layers; the schedule is then one on them, and takes the place of
            target_sparsity after the step to initial_sparsity.
        initial_sparsity: At the first step; 0 leaves the step at ``start`` out.
        one_shot: Prune once, straight to the target, and do not retrain. To retrain, or
            to train for n epochs before, set start = end = n instead.
        repeated_one_shot: Take all steps of the schedule in turn at ``start``, without
            training in between.
        from_dense: Each step of repeated_one_shot starts from the weights before the
            first one, not from those of the last.
        at_launch: A step to initial_sparsity at time 0 too, before ``start``.
        unit: What start, end and frequency count: epochs or steps (of ``train``).
        start: Of the schedule.
        end: Of the schedule; the target is reached here.
        frequency: Time between pruning steps.
        degree: Exponent of the schedule; 3 is the paper's.
        num_samples: N, gradients in the Fisher.
        batch_size: m, examples each gradient is the mean over.
        microbatch_size: Most examples whose gradients a device forms at once; default
            64, or as many as fit.
        damping: λ on the Fisher's diagonal.
        auto_damping: Take the λ by which each gradient is best predicted from the
            others in place of ``damping``.
        damping_search_samples: Training examples, none of the Fisher's, by the errors
            on which the damping is searched in steps of ten from the one above; some
            thousands, or 0 for no search.
        match: What a step of woodtaylor brings the network's outputs back to: outputs,
            those of the network before the first step, without any labels; labels, by
            the loss of batch_size examples a row, which is training; none, the
            gradients are those of the loss.
        match_metric: Of the distance to them, identity or softmax.
        damping_plus_weight_decay: Add weight_decay of ``train`` to the damping.
        centered: Take the covariance of the gradients for the Fisher.
        pi: For kfac, split the damping by the traces of the factors.
        hessian: For naivehess, exact or hutchinson.
        num_probes: Vectors of random signs of hutchinson; they follow the seed.
        mean_samples: Examples for the mean gradient of woodtaylor; default the Fisher
            samples, which also come first.
        block_size: c, weights a block; default whole tensors.
        scope: global or layer; default the method's own.
        pattern: What stays or goes together: 2:4 (any N:M of consecutive inputs), 4x1
            (any block of inputs by outputs), filters, heads:6 (attention heads, with
            their number); default single weights.
        update: How the remaining weights move: sum (the paper's), joint or none.
        scale_update: Factor on the update of the remaining weights; 0 for none.
        normalize_update: Largest norm of the update of a tensor, in norms of its
            weights; default no limit.
        swaps: Most rounds of swaps between weights that stay and weights that go, for
            the joint update.
        flops_power: Divide saliencies by the multiply-accumulates of their layer to
            this power.
        flops_per_parameter: Let a layer count by those of one of its weights.
        flops_normalize: log for their binary logarithm; none.
        recompute: How often a pruning step computes the curvature again on its way.
        recompute_schedule: linear, poly for long parts of the way first, or
            exponential for the same share of what is left at each.
        recompute_degree: Exponent of poly; default 3.
        solver: auto, sample_space, dense or recursion.
        store: Where gradients wait between statistic and update: auto, device, host,
            disk or recompute.
        store_dtype: float32 or bfloat16.
        store_dir: Parent of the folder for gradients on disk; default the system's
            folder for temporary files.
        memory_limit_gb: Most memory for a pruning step to take, in 1e9 bytes; default
            what is free.
        prunable: Regular expression on parameter paths; default arrays of two or more
            dimensions.
        prune_biases: Prune the biases of the layers that are pruned as well.
        label_smoothing: In the Fisher's loss, [0, 1).
        true_fisher: Draw the labels of Fisher samples from the model.
        augment: Augment the Fisher samples as in training.
        redraw_samples: Draw Fisher samples anew at each pruning step and
            recomputation; else always the same.
        batch_norm_samples: Training images that batch-norm statistics are estimated
            from anew after each pruning step; 0 leaves them as they are.
        batch_norm_augment: Augment those images as in training.
        loss_samples: Training examples that the loss is measured on before and after
            each pruning step, the Fisher samples first; default as many as those, 0 for
            none.
        diagnostics: Predicted loss increase, agreement with global magnitude and trace
            of the Fisher a layer, of each pruning step in ``results.json``.
        loss_path_steps: Steps from the old weights to the new ones at which the loss is
            measured and plotted, beside its quadratic model; 0 for no plot.
    """

    method: str = "woodfisherblock"
    target_sparsity: float = 0.9
    flops_target: float | None = None
    initial_sparsity: float = 0.0
    one_shot: bool = False
    repeated_one_shot: bool = False
    from_dense: bool = False
    at_launch: bool = False
    unit: str = "epochs"
    start: int = 0
    end: int = 0
    frequency: int = 1
    degree: float = 3.0
    num_samples: int = 100
    batch_size: int = 1
    microbatch_size: int | None = None
    damping: float = 1e-5
    auto_damping: bool = False
    damping_search_samples: int = 0
    match: str = "none"
    match_metric: str = "identity"
    damping_plus_weight_decay: bool = False
    centered: bool = False
    pi: bool = False
    hessian: str = "exact"
    num_probes: int = 64
    mean_samples: int | None = None
    block_size: int | None = None
    scope: str | None = None
    pattern: str | None = None
    update: str = "sum"
    scale_update: float = 1.0
    normalize_update: float | None = None
    swaps: int = 0
    flops_power: float = 0.0
    flops_per_parameter: bool = False
    flops_normalize: str = "none"
    recompute: int = 0
    recompute_schedule: str = "linear"
    recompute_degree: float | None = None
    solver: str = "auto"
    store: str = "auto"
    store_dtype: str = "float32"
    store_dir: str | None = None
    memory_limit_gb: float | None = None
    prunable: str | None = None
    prune_biases: bool = False
    label_smoothing: float = 0.0
    true_fisher: bool = False
    augment: bool = False
    redraw_samples: bool = True
    batch_norm_samples: int = 0
    batch_norm_augment: bool = True
    loss_samples: int | None = None
    diagnostics: bool = False
    loss_path_steps: int = 0

    @property
    def needs_dense(self) -> bool:
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
class DistributedConfig:
    """How the processes of a run find one another.

    Attributes:
        coordinator: host:port of process 0; auto on a TPU pod, under Slurm or Open MPI.
            Default a run of one process.
        num_processes: How many there are; auto may leave it out.
        process_id: Which one this is, from 0; auto may leave it out. The one field in
            which the processes differ.
        start_timeout_seconds: How long to wait for the others at the start.
        heartbeat_timeout_seconds: After how long a silent process is taken for dead,
            which ends the others.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        seed: Of the initial weights, the order of examples and the Fisher samples.
        init_from: A PyTorch checkpoint (or .npz, .safetensors) of the dense network, or
            the folder of another run; it takes the place of training it.
        compare_with: Methods to run after the main one on the same schedule, with the
            same options as far as they have them.
        checkpoint_every_epochs: Besides a checkpoint after every pruning step.
        eval_batch_size: Examples a step of evaluation.
        compile_cache_dir: Folder for compiled programs, which a resumed run then need
            not compile again; default none.
        distributed: See :class:`DistributedConfig`.
        data: See :class:`DataConfig`.
        model: See :class:`ModelConfig`.
        dense: Training of the dense network, unless ``init_from`` is given.
        train: Training during and after pruning.
        prune: See :class:`PruneConfig`.
        also_prune: Further pruners of other weights, each with its own method, target
            and schedule; in a config file the sections ``prune_2``, ``prune_3``, ...,
            which state what differs from ``prune``.
    """

    seed: int = 0
    init_from: str | None = None
    compare_with: tuple[str, ...] = ()
    checkpoint_every_epochs: int = 1
    eval_batch_size: int = 1000
    compile_cache_dir: str | None = None
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
