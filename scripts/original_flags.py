"""The 130 command-line options of the original WoodFisher code, and its yaml files.

docs/migration.md says what became of each.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

# The flags there: those with a value and its default by type, and switches.
STRINGS = """
    dset=imagenet dset_path= arch=efficientnetb0 config_path= gpus=
    experiment_root_path=../exp_root exp_name=default_exp logging_level=info
    from_checkpoint_path= load_distiller_weights_from= load-fisher=
    prune-class=woodfisher prune-optimizer= prune-modules= result-file=
    flops-normalize= onnx-nick= recompute-schedule=
"""
INTEGERS = """
    kernel_sizes=3 p=3 epochs= batch_size=256 test-batch_size= num_samples=4096
    workers=4 training_stats_freq=30 checkpoint_freq=1 ckpt-epoch=-1
    num-hidden-nodes1=40 num-hidden-nodes2=20 num-classes=10 seed=0 fisher-seed=-1
    fisher-parts=5 fisher-subsample-size=32 aux-gpu-id=-1 prune-start= prune-end=
    prune-freq= sweep-id=-1 fisher-mini-bsz=1 max-mini-bsz= fittable-params=-1
    grad-subsample-size= recompute-num=
"""
FLOATS = """
    se_ratio= fisher-damp=0.001 init-sparsity= target-sparsity= prune-lr=
    prune-momentum= prune-wdecay= num-path-steps=-1.0 eps=1e-10
    normalize-update-mult=1.0 scale-prune-update=1.0 flops-power=0.0
    flops-target=-1.0 flops-epsilon=1.0 recompute-degree= label-smoothing=0.0
    hess-label-smoothing=
"""
SWITCHES = """
    pretrained use_butterfly use_se aa recompute_bn_stats cpu use-model-config
    reset_training_policy disable-log-soft enable-dropout disable_bias
    fisher-optimized save-fisher fisher-cpu update-config untrained-last one-shot
    prune-bias prune-all set-prune-momentum not-oldfashioned ignore-prefix
    batched-test cache-subset-ids full-subsample deterministic normalize-hgp
    prune-direction previous-mask zero-after-prune compare-models no-dataparallel
    always-eval-test disable-train-random-transforms disable-train-shuffle
    check-train-loss save-before-prune-ckpt inspect-inv prune-at-launch
    layer-trace-stat woodburry-joint-sparsify dump-grads-mat dump-fisher-inv-mat
    fisher-trace check-grads true-fisher fisher-split-grads offload-inv
    offload-grads eval-fast export_onnx fisher-damp-correction normalize-update
    kfac-pi local-quadratic compare-globalmagni-mask spearman-globalmagni
    subtract-min repeated-one-shot centered flops flops-per-param topk mask-onnx
    save-dense-also disable-wdecay-after-prune woodtaylor-abs fisher-effective-damp
"""

UPDATES = """
    prune-class prune-start prune-freq prune-end prune-modules init-sparsity
    target-sparsity prune-all prune-bias prune-optimizer prune-lr prune-wdecay
    prune-momentum
"""
"""Those of which the original takes notice only with ``--update-config``."""

METHODS = {
    "MagnitudePruner": "magni",
    "GlobalMagnitudePruner": "globalmagni",
    "FisherPruner": "diagfisher",
    "NaiveHessianPruner": "naivehess",
    "WoodburryFisherPruner": "woodfisher",
    "WoodburryTaylorPruner": "woodtaylor",
    "BlockwiseWoodburryFisherPruner": "woodfisherblock",
    "FlopsBlockwiseWoodburryFisherPruner": "woodfisherblock_flops",
    "BlockwiseWoodburryTaylorPruner": "woodtaylorblock",
    "KFACFisherPruner": "kfac",
    "DynamicBlockwiseWoodburryFisherPruner": "woodfisherblockdynamic",
    "GroupBlockwiseWoodburryFisherPruner": "woodfisherblockgroup",
}
"""Class in a yaml file -> name in the table here, which is also the flag's word."""


def names() -> list[str]:
    """All flags, with their dashes."""
    valued = " ".join((STRINGS, INTEGERS, FLOATS)).split()
    words = [word.partition("=")[0] for word in valued] + SWITCHES.split()
    return [f"--{word}" for word in words]


def parse(arguments: list[str], description: str) -> argparse.Namespace:
    """The path of a yaml file, and the flags as they are given to the original."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("yaml", type=Path, help="config file of the original")
    for kind, flags in ((str, STRINGS), (int, INTEGERS), (float, FLOATS)):
        for word in flags.split():
            flag, _, default = word.partition("=")
            initial = kind(default) if default else None
            parser.add_argument(f"--{flag}", type=kind, default=initial)
    for flag in SWITCHES.split():
        parser.add_argument(f"--{flag}", action="store_true")
    return parser.parse_args(arguments)


def idle(flags: argparse.Namespace) -> list[str]:
    """Flags that are given and have no effect for want of ``--update-config``."""

    def given(flag: str) -> bool:
        value = getattr(flags, flag.replace("-", "_"))
        return value not in (None, False, "woodfisher")

    return [f for f in UPDATES.split() if not flags.update_config and given(f)]


def read(path: Path) -> dict[str, Any]:
    """The content of a yaml file of the original.

    Raises:
        SystemExit: With a message, if there is none or it is not such a file.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is not yaml: {error}") from error
    missing = [key for key in ("pruners", "trainers") if key not in (found or {})]
    if missing:
        raise SystemExit(
            f"{path} has no {' and no '.join(missing)}; expected a config of the "
            "original, with sections pruners and trainers"
        )
    return found
