"""Programs of their own."""

import jax.numpy as jnp
import pytest

from woodfisher_jax import compilation


def test_it_is_traced_once_for_each_static_argument() -> None:
    traced = []

    @compilation.quickly_compiled("power")
    def raised(x, power):
        traced.append(power)
        return x**power

    for power in (2, 2, 3, 2):
        assert raised(jnp.float32(2.0), power=power) == 2.0**power
    assert traced == [2, 3]


def test_an_option_that_xla_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the others show that it has those that are given."""
    monkeypatch.setattr(compilation, "QUICK", {"xla_cpu_no_such_option": False})
    with pytest.raises(Exception, match="no_such_option"):
        compilation.quickly_compiled()(jnp.sin)(jnp.float32(1.0))
