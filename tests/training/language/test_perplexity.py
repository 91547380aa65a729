import numpy as np
import pytest
from numpy_layers import softmax

from woodfisher_jax.options import OptionError
from woodfisher_jax.training.language.perplexity import perplexity


def test_perplexity_by_kind_against_its_definition():
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(6, 6)), rng.integers(0, 6, (4, 5))
    kinds = ["a", "b", "a", "b"]
    chances = softmax(table)[tokens[:, :-1], tokens[:, 1:]]
    expected = np.exp(-np.log(chances).mean())
    notes = []
    found = perplexity(
        lambda params, tokens: params[tokens],
        np.float32(table),
        tokens,
        kinds,
        lambda *note: notes.append(note),
    )
    assert found.all == pytest.approx(expected, rel=1e-5)
    own = np.exp(-np.log(chances[1::2]).mean())
    assert found.by_kind["b"] == pytest.approx(own, rel=1e-5)
    assert list(found.by_kind) == ["a", "b"]
    assert notes[-1] == ("perplexity", 4, 4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 1, 2], [5, 6, -1]], r"tokens has 6 at \[1, 1\]; expected 0 to 5, the"),
        ([[0, -1, 2]], r"tokens has -1 at \[0, 1\]; expected 0 to 5"),
        ([0, 1, 2], r"tokens is int64\[3\]; expected whole numbers \[sequences, T\]"),
        ([[0.5, 1.0]], r"tokens is float64\[1, 2\]; expected whole numbers"),
    ],
)
def test_what_are_no_tokens_of_the_network_is_refused(tokens, message):
    with pytest.raises(OptionError, match=message):
        perplexity(lambda params, tokens: params[tokens], np.ones((6, 6)), tokens)
