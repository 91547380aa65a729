"""Config files are found, read over the defaults and overridden; errors say how."""

import runpy
from pathlib import Path

import ml_collections
import pytest

from woodfisher_jax.models import MODELS
from woodfisher_jax.training import config_files
from woodfisher_jax.training.config import Config, ConfigError, from_dict, to_dict
from woodfisher_jax.training.config_files import (
    defaults,
    find,
    load_config,
    override,
    shipped,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = [
    (path.stem, word)
    for path in FILES
    for word in ("", *runpy.run_path(str(path)).get("VARIANTS", ()))
]


# ------------------------------------------------------------------------------ files


def test_the_defaults_are_the_dataclasses() -> None:
    assert from_dict(defaults().to_dict()) == Config()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_config_can_be_run(path: Path) -> None:
    config = from_dict(load_config(str(path)).to_dict())
    assert config.prune.stages[-1].sparsity == config.prune.target_sparsity
    docstring = path.read_text()
    assert f"--config=configs/{path.name}" in docstring
    assert to_dict(config)["model"]["name"] in MODELS


def test_the_counterparts_of_the_originals_scripts_are_there() -> None:
    words = {"80", "90", "95", "98", "magnitude_80", "magnitude_90", "magnitude_95"}
    words |= {"magnitude_98", "flops_power", "flops_335", "two_pruners", "one_shot"}
    assert {word for stem, word in VARIANTS if stem == "resnet50"} >= words
    words = {"75", "89", "magnitude_75", "magnitude_89", "smoke"}
    assert {word for stem, word in VARIANTS if stem == "mobilenet_v1"} >= words


@pytest.mark.parametrize(("stem", "word"), VARIANTS)
def test_each_variant_is_found_by_name_and_can_be_checked(stem: str, word: str) -> None:
    config = from_dict(load_config(f"{stem}{':' if word else ''}{word}").to_dict())
    for pruner in config.pruners.values():
        assert pruner.stages[-1].sparsity == pruner.target_sparsity
        at_once = pruner.one_shot or pruner.repeated_one_shot
        assert at_once or pruner.stages[-1].time == pruner.end


def test_names_are_those_of_the_folder_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # A name is no path.
    assert [find(path.stem) for path in FILES] == FILES
    assert list(shipped()) == [path.stem for path in FILES]
    assert shipped()["digits"].startswith("A small MLP")


def test_a_path_is_a_file_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text("")
    assert find("digits.py") == Path("digits.py")
    assert find(f"{tmp_path}/digits.py:word") == tmp_path / "digits.py"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("digitz", ["--config=digitz", "mnist_mlpnet", "did you mean --config=digits"]),
        (
            "configs/digit.py",
            ["no file configs/digit.py", "did you mean --config=digi"],
        ),
        ("resnet_50:95", ["did you mean --config=resnet50?"]),
        ("zzz", ["no config of that name", "my.py", "resnet50, vit_small"]),
        ("resnet50:91", ["resnet50:91", "80, 90, 95", "'91'"]),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(
    given: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(given)
    for word in words:
        assert word in str(caught.value)


def test_a_config_file_may_take_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("def get_config(word='x'):\n    return {'data': {'name': word}}\n")
    assert load_config(f"{path}:mnist").data.name == "mnist"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def get_config():\n    return {'sede': 1}\n",
            ["config.sede", "config.seed?"],
        ),
        (
            "def get_config():\n    return {'prune': {'dampin': 1}}\n",
            ["config.prune.dampin", "config.prune.damping?"],
        ),
        ("def get_config():\n    return {'seed': 'a'}\n", ["config.seed='a'", "int"]),
        ("x = 1\n", ["must define get_config()"]),
        ("import nothing_here\n", ["line 1", "ModuleNotFoundError", "nothing_here"]),
        ("def get_config():\n    return 1 / 0\n", ["c.py, line 2: ZeroDivisionError"]),
        ("def get_config(:\n", ["SyntaxError", "line 1"]),
    ],
)
def test_a_bad_config_file_is_refused(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    for word in words:
        assert word in str(caught.value)


# -------------------------------------------------------------------------- overrides


def test_what_flags_can_do_is_left_to_them() -> None:
    values = load_config("digits")
    arguments = ["main", "--workdir=x", "--config.seed=1", "-config.prune.damping=2"]
    assert override(arguments, values) == arguments
    assert values == load_config("digits")


def test_a_setting_is_added_and_a_number_taken_away() -> None:
    values = load_config("resnet50")
    assert values.prune.block_size == 2000
    arguments = [
        "--config.prune.block_size=None",
        "--config.train.optimizer.nesterov=True",
        "--config.model.stem=cifar",
    ]
    assert override(arguments, values) == []
    assert values.prune.block_size is None
    assert values.train.optimizer.nesterov is True
    assert values.model.stem == "cifar"


def test_a_field_by_the_name_of_a_method_is_set() -> None:
    values = load_config("digits")
    assert override(["--config.prune.update=joint"], values) == []
    assert values.prune["update"] == "joint"
    named = {
        (group, field): value
        for group, fields in load_config("digits").items()
        if isinstance(fields, ml_collections.ConfigDict)
        for field, value in fields.items()
        if hasattr(ml_collections.ConfigDict, field)
    }
    assert named == {("prune", "update"): "sum"}  # It is set to text as given.


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "--config.prune.update",
            r"has no value; expected --config.prune.update=VALUE",
        ),
        ("--config.prune.methdo=x", "config.prune.methdo .* mean config.prune.method?"),
        ("--config.prun.method=x", "config.prun does not .* mean config.prune?"),
        ("--config.prune=x", "config.prune is a group .* --config.prune.FIELD=VALUE"),
        ("--config.seed.x=3", "config.seed is no group .* no config.seed.x"),
    ],
)
def test_an_override_of_nothing_is_refused(argument: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override([argument], load_config("digits"))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "flag --config.prune.num_samples=abc: invalid literal",
            "config.prune.num_samples='abc'; expected a whole number, such as 100",
        ),
        (
            "flag --config.model.hidden=(5,: Error while parsing",
            "config.model.hidden='(5,'; expected values in brackets, such as "
            '"(40, 20)"',
        ),
        (
            "flag --quiet=3: ('Non-boolean argument to boolean flag', '3')",
            "quiet='3'; expected True or False",
        ),
        ("flag --workdir=: something else", "flag --workdir=: something else"),
        ("something else", "something else"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_as_users_write_it(
    message: str, expected: str
) -> None:
    assert config_files.unreadable(message, load_config("digits")) == expected


# ------------------------------------------------------------------------------- help


def test_every_field_is_explained() -> None:
    text = config_files.explained(load_config("resnet50:two_pruners"))
    assert "  --config.prune.block_size=2000\n      c, weights a block" in text
    assert "--config.prune_2.target_sparsity=0.8\n" in text
    assert "--config.train.optimizer.name=sgd\n" in text
    # Every field has words of its own in the docstring of its section.
    unexplained = text.count("a setting of what is named above")
    assert unexplained == text.count("optimizer.momentum=")
