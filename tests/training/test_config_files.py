"""Config files are found, read over the defaults and overridden; errors say how."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from woodfisher_jax.methods import METHODS
from woodfisher_jax.models import MODELS
from woodfisher_jax.options import fields_of
from woodfisher_jax.training.config import (
    Config,
    ConfigError,
    build_language,
    from_dict,
    step_options,
    to_dict,
)
from woodfisher_jax.training.config.files import (
    explained,
    find,
    load_config,
    override,
    shipped,
)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import option_tables  # noqa: E402

FILES = sorted((ROOT / "configs").glob("*.py"))
LANGUAGE = ("smollm2",)
VARIANTS = [
    (path.stem, word)
    for path in FILES
    if path.stem not in LANGUAGE
    for word in ("", *runpy.run_path(str(path)).get("VARIANTS", ()))
]


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_config_can_be_run(path: Path) -> None:
    docstring = path.read_text()
    assert f"--config=configs/{path.name}" in docstring
    values = load_config(str(path))
    if path.stem in LANGUAGE:
        assert build_language(values).prune.sparsity == 0.6
        return
    config = from_dict(values)
    assert config.prune.stages[-1].sparsity == config.prune.target_sparsity
    assert to_dict(config)["model"]["name"] in MODELS


def test_the_counterparts_of_the_originals_scripts_are_there() -> None:
    words = {"80", "90", "95", "98", "magnitude_80", "magnitude_90", "magnitude_95"}
    words |= {"magnitude_98", "flops_power", "flops_335", "two_pruners", "one_shot"}
    assert {word for stem, word in VARIANTS if stem == "resnet50"} >= words
    words = {"75", "89", "magnitude_75", "magnitude_89", "smoke"}
    assert {word for stem, word in VARIANTS if stem == "mobilenet_v1"} >= words


@pytest.mark.parametrize(("stem", "word"), VARIANTS)
def test_each_variant_is_found_by_name_and_can_be_checked(stem: str, word: str) -> None:
    config = from_dict(load_config(f"{stem}{':' if word else ''}{word}"))
    assert from_dict(to_dict(config)) == config
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
        ("zzz", ["no config of that name", "my.py", "smollm2, vit_small"]),
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
    assert load_config(f"{path}:mnist") == {"data": {"name": "mnist"}}


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
        ("def get_config():\n    return {'seed': 'a'}\n", ["config.seed='a'", "whole"]),
        ("def get_config():\n    return None\n", ["c.py", "expected", "None"]),
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
        from_dict(load_config(str(path)))
    for word in words:
        assert word in str(caught.value)


OWN_METHOD = """
import dataclasses
import woodfisher_jax as wf

@dataclasses.dataclass(frozen=True)
class Snip(wf.Sampled):
    power: float = wf.option(1.0, "Exponent of the gradient.", above=0)
    rounds: int | None = wf.option(None, "How often.", least=1)

wf.METHODS["snip"] = Snip()

def get_config():
    return {"prune": {"method": "snip", "power": 2.0}}
"""


def test_a_config_file_may_bring_a_method_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "snip", METHODS["diagfisher"])  # Restored at the end.
    path = tmp_path / "c.py"
    path.write_text(OWN_METHOD)
    config = overridden(str(path), "--config.prune.rounds=3")
    method = step_options(config, config.prune).method
    assert (method.power, method.rounds, method.num_samples) == (2.0, 3, 100)
    text = explained(config)
    assert "  --config.prune.power=2.0\n      Exponent of the gradient." in text
    for wrong in ("power=0", "rounds=x", "powr=1"):
        with pytest.raises(ConfigError, match=f"config.prune.{wrong[:4]}"):
            overridden(str(path), f"--config.prune.{wrong}")


# -------------------------------------------------------------------------- overrides


def overridden(config: str, *arguments: str) -> Config:
    """The config of a command line."""
    values = load_config(config)
    for argument in arguments:
        override(values, argument)
    return from_dict(values)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.seed=1", 1),
        ("-config.seed=1", 1),
        ("--config.prune.damping=2", 2.0),
        ("--config.prune.damping=auto", 1e-5),
        ("--config.prune.auto_damping", True),
        ("--noconfig.prune.augment", False),
        ("--config.prune.augment=f", False),
        ("--config.prune.block_size=None", None),
        ("--config.prune.update=joint", "joint"),
        ("--config.prune.store_dir=7", "7"),
        ("--config.data.name=None", "None"),
        ("--config.train.decay_end_epoch=4", 4),
        ("--config.train.optimizer.nesterov=True", True),
        ("--config.train.optimizer.eps=1e-3", 1e-3),
        ("--config.model.stem=cifar", "cifar"),
        ("--config.compare_with=kfac", ["kfac"]),
        ("--config.compare_with=('kfac', 'magni')", ["kfac", "magni"]),
        ("--config.prune_2.prunable=fc", "fc"),
    ],
)
def test_a_text_is_read_by_the_type_of_its_field(argument: str, expected: Any) -> None:
    optimizer = "--config.train.optimizer.name=adamw" if "eps" in argument else ""
    found: Any = to_dict(overridden("resnet50", *filter(None, [optimizer]), argument))
    for key in argument.partition("=")[0].split(".")[1:]:
        found = found[key]
    assert found == expected
    assert type(found) is type(expected)


def test_a_setting_that_is_a_tuple_stays_one() -> None:
    for text, hidden in (("8", (8,)), ("(8, 4)", (8, 4)), ("x", ("x",))):
        config = overridden("digits", f"--config.model.hidden={text}")
        assert config.model.settings["hidden"] == hidden


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.prune.update", "has no value; expected --config.prune.update=VALUE"),
        ("--config.prune.methdo=x", "config.prune.methdo .* mean config.prune.method?"),
        ("--config.prun.method=x", "config.prun does not .* mean config.prune?"),
        ("--config.prune=x", "config.prune is a group .* --config.prune.FIELD=VALUE"),
        ("--config.prune_2=x", "config.prune_2 is a group"),
        ("--config.seed.x=3", "config.seed is no group"),
        ("--config.prune.damping.x=3", "config.prune.damping is no group"),
    ],
)
def test_an_override_of_nothing_is_refused(argument: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(load_config("digits"), argument)


# ------------------------------------------------------------------------------- help


def test_every_field_is_explained() -> None:
    text = explained(from_dict(load_config("resnet50:two_pruners")))
    assert "  --config.prune.block_size=2000\n      c, weights a block" in text
    assert "--config.prune_2.target_sparsity=0.8\n" in text
    assert "--config.train.optimizer.name=sgd\n" in text
    # Every field has its documentation.
    unexplained = text.count("A setting of the above.")
    assert unexplained == text.count("optimizer.momentum=")


NAMES = ("configs.md", "methods.md", "language_models.md")
PAGES = [ROOT / "docs" / name for name in NAMES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_docs_are_the_dataclasses(page: Path) -> None:
    text = page.read_text()
    assert option_tables.rewritten(text) == text, "run python scripts/option_tables.py"


def test_every_option_is_in_a_table_of_the_docs() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in (*option_tables.SECTIONS, option_tables.METHODS_TABLE):
        assert text.count(f"<!-- options: {name} -->") == 1
    for section in (*option_tables.SECTIONS.values(), *map(type, METHODS.values())):
        for name in fields_of(section):
            assert f"\n| `{name}` | " in text
