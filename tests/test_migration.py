"""Everything of the original has a line in docs/migration.md, a field or a config."""

import copy
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from woodfisher_jax.training.config import Config, PruneConfig, from_dict, to_dict
from woodfisher_jax.training.config.files import load_config

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "migration.md").read_text()
SCRIPTS = ROOT / "scripts"

sys.path.insert(0, str(SCRIPTS))
import convert_config  # noqa: E402
import original_flags  # noqa: E402
import sweep  # noqa: E402

YAML_KEYS = """
    pruners pruners.*.class pruners.*.epochs pruners.*.weight_only
    pruners.*.initial_sparsity pruners.*.target_sparsity pruners.*.modules
    pruners.*.keep_pruned pruners.*.degree trainers trainers.*.optimizer.class
    trainers.*.optimizer.lr trainers.*.optimizer.momentum
    trainers.*.optimizer.weight_decay trainers.*.lr_scheduler.class
    trainers.*.lr_scheduler.gamma trainers.*.lr_scheduler.epochs regularizers recyclers
"""


def test_each_flag_has_one_row() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| .+ \|$", TABLE, re.MULTILINE)
    assert sorted(rows) == sorted(original_flags.names())
    assert len(set(rows)) == 130


def test_each_yaml_key_has_one_row() -> None:
    table = TABLE.split("## Keys")[1]
    rows = re.findall(r"^\| `([a-z][\w.*]+)` \| .+ \|$", table, re.MULTILINE)
    assert sorted(rows) == sorted(YAML_KEYS.split())


def test_fields_of_the_tables_exist() -> None:
    config = to_dict(Config())
    fields = {
        f"{name}.{field}" for name in ("prune", "train") for field in config[name]
    }
    named = set(re.findall(r"`((?:prune|train)\.\w+)", TABLE))
    assert named <= fields
    for path in re.findall(r"`((?:configs|scripts|tests)/\w+\.py)", TABLE):
        assert (ROOT / path).exists(), path


# ------------------------------------------------------------------- the config's twin


def converted(tmp_path: Path, text: str, *flags: str) -> tuple[Config, list[str]]:
    """A config by way of the file that the script writes."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    found = original_flags.parse([str(path), *flags], "")
    values, notes = convert_config.convert(found, original_flags.read(path))
    written = tmp_path / "converted.py"
    written.write_text(convert_config.render(values, "command"))
    config = from_dict(load_config(str(written)))
    assert config == from_dict(values)
    return config, notes


YAML = """
pruners:
  pruner_1:
    class: {kind}
    epochs: {epochs}
    weight_only: True
    initial_sparsity: {initial}
    target_sparsity: 0.90
    keep_pruned: False
    modules: [{modules}]
trainers:
  default_trainer:
    optimizer: {{class: SGD, lr: {lr}, momentum: {momentum}, weight_decay: {decay}}}
    lr_scheduler: {{class: ExponentialLR, gamma: {gamma}, epochs: {steps}}}
"""

MLP_FILE = {
    "kind": "MagnitudePruner",
    "epochs": "[0, 2, 10]",
    "initial": 0.05,
    "modules": "fc1, fc2",
    "lr": 0.005,
    "momentum": 0.9,
    "decay": 0.0001,
    "gamma": 0.6,
    "steps": "[5, 2, 12]",
}
MNIST = ("--arch=mlpnet", "--dset=mnist", "--epochs=14")

COMMON = """
    --update-config --fisher-split-grads --woodburry-joint-sparsify --offload-inv
    --offload-grads --full-subsample --batched-test --eval-fast --not-oldfashioned
    --disable-log-soft --use-model-config --sweep-id 20 --fisher-damp 1e-5 --epochs 100
    --dset=imagenet --checkpoint_freq 5 --test-batch_size 256
"""


def resnet50_modules() -> list[str]:
    blocks = [(1, 3), (2, 4), (3, 6), (4, 3)]
    names = ["conv1", "fc"]
    for layer, number in blocks:
        names.append(f"layer{layer}.0.downsample.0")
        names += [
            f"layer{layer}.{block}.conv{conv}"
            for block in range(number)
            for conv in (1, 2, 3)
        ]
    return names


def plain(config: Config) -> dict[str, Any]:
    """The config without what the original does not say."""
    values = to_dict(config)
    for name in ("prune", "prune_2"):
        if name in values:
            values[name].pop("loss_samples")
            values[name].pop("scope")  # stated by one, the default for the other
    values.pop("dense")  # the original's ImageNet runs start from a checkpoint
    values["train"]["optimizer"].setdefault("momentum", 0.9)
    return values


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        (
            "80",
            "--prune-class woodfisherblockdynamic --target-sparsity 0.8 --batch_size "
            "256 --fittable-params 2000 --scale-prune-update 0.9",
        ),
        pytest.param(
            "98",
            "--prune-class woodfisherblock --target-sparsity 0.98 --batch_size 180 "
            "--fittable-params 1000",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "flops_power",
            "--prune-class woodfisherblock --target-sparsity 0.9023 --batch_size 180 "
            "--fittable-params 2000 --flops-power 0.3 --flops-per-param "
            "--disable-wdecay-after-prune",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "flops_335",
            "--prune-class woodfisherblock_flops --target-sparsity 0.9023 --batch_size "
            "180 --fittable-params 2000 --flops-power 0.3 --flops-per-param "
            "--flops-target 335 --flops-epsilon 0.1 --disable-wdecay-after-prune",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resnet50_is_the_originals(tmp_path: Path, variant: str, flags: str) -> None:
    text = YAML.format(
        kind="BlockwiseWoodburryFisherPruner",
        epochs=[1, 5, 40],
        initial=0.05,
        modules=", ".join(resnet50_modules()),
        lr=0.005,
        momentum=0.9,
        decay=0.0001,
        gamma=0.6,
        steps=[40, 6, 90],
    )
    arch = ["--arch=resnet50", "--fisher-subsample-size=400", "--fisher-mini-bsz=400"]
    config, notes = converted(tmp_path, text, *COMMON.split(), *arch, *flags.split())
    path = f"{ROOT / 'configs' / 'resnet50.py'}:{variant}"
    assert plain(config) == plain(from_dict(load_config(path)))
    assert any("the last step is at 40" in note for note in notes)


def test_mobilenet_is_the_originals(tmp_path: Path) -> None:
    modules = [
        "model.0.0",
        "fc",
        *(f"model.{k}.{i}" for k in range(1, 14) for i in (0, 3)),
    ]
    text = YAML.format(
        kind="BlockwiseWoodburryFisherPruner",
        epochs=[4, 4, 24],
        initial=0.05,
        modules=", ".join(modules),
        lr=0.005,
        momentum=0.9,
        decay=0.0001,
        gamma=0.92,
        steps=[30, 1, 100],
    )
    flags = (
        "--arch=mobilenet --fisher-subsample-size=400 --fisher-mini-bsz=2400 "
        "--max-mini-bsz=800 --prune-class woodfisherblock --target-sparsity 0.89 "
        "--batch_size 180 --fittable-params 10000"
    )
    config, _ = converted(tmp_path, text, *COMMON.split(), *flags.split())
    path = f"{ROOT / 'configs' / 'mobilenet_v1.py'}:89"
    expected = plain(from_dict(load_config(path)))
    # A factor after epoch 100 of 100 is none.
    expected["train"]["decay_end_epoch"] = 101
    assert plain(config) == expected


def test_some_modules_become_a_regular_expression(tmp_path: Path) -> None:
    text = YAML.format(
        kind="WoodburryFisherPruner",
        epochs=[0, 2, 22],
        initial=0.0,
        modules="layer2.2.conv2, layer3.0.downsample.0, layer9.0.conv1",
        lr=0.001,
        momentum=0.9,
        decay=0.0001,
        gamma=0.1,
        steps=[30, 5, 50],
    )
    config, notes = converted(tmp_path, text, "--arch=resnet20", "--dset=cifar10")
    assert config.prune.prunable == (
        "^(layer2/block2/conv2|layer3/block0/downsample_conv)/kernel$"
    )
    assert any("layer9.0.conv1" in note for note in notes)
    assert config.prune.method == "woodfisher"
    assert config.train.epochs == 23


def test_options_of_a_small_run(tmp_path: Path) -> None:
    text = YAML.format(
        kind="WoodburryFisherPruner",
        epochs=[0, 2, 2],
        initial=0.0,
        modules="fc2",
        lr=0.001,
        momentum=0.5,
        decay=0.0,
        gamma=0.9,
        steps=[120, 1, 140],
    )
    flags = (
        "--arch=mlpnet --dset=mnist --update-config --prune-class=kfac --kfac-pi "
        "--one-shot --target-sparsity=0.95 --fisher-subsample-size=100 "
        "--woodburry-joint-sparsify --prune-modules=fc1_fc2_fc3 --seed=1 --true-fisher "
        "--cache-subset-ids --prune-optimizer=Adam --scale-prune-update=0.5 --aa"
    )
    config, notes = converted(tmp_path, text, *flags.split())
    assert config.prune == PruneConfig(
        method="kfac",
        one_shot=True,
        target_sparsity=0.95,
        num_samples=100,
        redraw_samples=False,
        options={"damping": 1e-3, "scope": "global", "pi": True},
    )
    assert config.seed == 1
    assert config.data.autoaugment
    assert config.train.optimizer.name == "adam"
    assert config.train.optimizer.settings == {}
    words = " ".join(notes)
    assert "optimizer.momentum" in words
    assert "--scale-prune-update" in words


def test_the_script_prints_a_config(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(YAML.format(**MLP_FILE))
    script = SCRIPTS / "convert_config.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(path), *MNIST])
    runpy.run_path(str(script), run_name="__main__")
    (tmp_path / "converted.py").write_text(capsys.readouterr().out)
    config = from_dict(load_config(str(tmp_path / "converted.py")))
    assert config.prune.method == "magni"
    assert config.prune.prunable == "^(?!fc3/).*kernel$"


# -------------------------------------------------------------------------- the sweeps


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_each_run_of_a_sweep_is_a_config(name: str) -> None:
    one = sweep.SWEEPS[name]
    folders = set()
    base = to_dict(from_dict(load_config(str(ROOT / one.config))))
    for fields in sweep.runs(one):
        values = copy.deepcopy(base)
        for field, value in fields.items():
            *sections, key = field.split(".")
            group = values
            for section in sections:
                group = group[section]
            assert key in group, field
            group[key] = value
        if not fields.get("seed"):  # seeds are all alike to the checks
            from_dict(values)
        command = sweep.command(one, fields, "runs")
        folders.add(command.split("--workdir=")[1])
        assert f"--config={one.config}" in command
    assert len(folders) == len(list(sweep.runs(one)))


def test_sweeps_are_as_long_as_the_originals() -> None:
    assert {name: len(list(sweep.runs(one))) for name, one in sweep.SWEEPS.items()} == {
        "digits_gradual": 3 * 3,
        "digits_gradual_short": 3 * 3,
        "mnist_gradual": 2 * 3,
        "mlpnet_oneshot": 5 * 10 * 4,
        "mlpnet_kfac": 3 * 11 * 4 + 11,
        "mnist_tests": 3,
        "resnet20_oneshot": 5 * 10 * 3,
        "resnet50_layerwise": 7 * 3,
    }


# -------------------------------------------------------------------- as it is used


def test_each_flag_for_diagnostics_turns_them_on(tmp_path) -> None:
    file = YAML.format(**MLP_FILE)
    assert not converted(tmp_path, file, *MNIST)[0].prune.diagnostics
    for flag in convert_config.DIAGNOSTICS:
        given = f"--{flag.replace('_', '-')}"
        assert converted(tmp_path, file, *MNIST, given)[0].prune.diagnostics


def test_a_flag_that_needs_another_is_said_to_be_idle(tmp_path) -> None:
    file = YAML.format(**MLP_FILE)
    flags = [*MNIST, "--target-sparsity=0.5", "--prune-class=kfac"]
    config, notes = converted(tmp_path, file, *flags)
    assert config.prune.target_sparsity == 0.9
    for flag in ("--target-sparsity", "--prune-class"):
        assert f"{flag}: idle without --update-config, as there" in notes
    config, notes = converted(tmp_path, file, *flags, "--update-config")
    assert (config.prune.target_sparsity, config.prune.method) == (0.5, "kfac")
    assert not [note for note in notes if "idle" in note]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("a: [1", "is not yaml"),
        ("a: 1", "has no pruners and no trainers"),
        ("", "has no pruners"),
    ],
)
def test_a_file_that_is_none_of_the_original_s(tmp_path, text, message) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        convert_config.main([str(path), "--arch=mlpnet", "--dset=mnist"])
