import pytest

from woodfisher_jax.training.config import Config, ConfigError
from woodfisher_jax.training.config.arguments import joined, listed, read_config


def test_a_value_may_be_an_argument_of_its_own() -> None:
    given = ["m", "--config", "digits", "--config.seed", "-1", "--config.x.y", "--plan"]
    expected = ["m", "--config=digits", "--config.seed=-1", "--config.x.y", "--plan"]
    assert joined(given) == expected


def test_overrides_change_the_config_that_is_named() -> None:
    name, config = read_config(["--config=digits", "--config.seed=3"])
    assert name == "digits"
    assert isinstance(config, Config)
    assert config.seed == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"no config is given; expected one of\n  cifar"),
        (["--config.seed=3"], "no config is given"),
        (["--config=digits", "--config=mlp"], "--config is given 2 times"),
        (["--config=digits", "--config.sed=3"], r"did you mean config\.seed\?"),
    ],
)
def test_what_names_no_config_or_no_field(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(arguments)


def test_the_configs_of_the_package_are_a_line_each() -> None:
    for line in listed().splitlines():
        name, summary = line.split(maxsplit=1)
        assert read_config([f"--config={name}"])[0] == name
        assert summary
        assert len(line) <= 80
