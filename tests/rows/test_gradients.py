"""Gradients are those of calculus, in order, whatever the chunks they come in."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from woodfisher_jax.rows.gradients import (
    as_partial,
    gradient_rows,
    row_chunks,
    sample_labels,
)
from woodfisher_jax.rows.problem import Problem
from woodfisher_jax.trees.axes import WeightAxes
from woodfisher_jax.trees.blocks import flat_order

EXAMPLES, INPUTS, OUTPUTS = 23, 5, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((EXAMPLES, INPUTS)).astype(np.float32)
Y = RANDOM.standard_normal((EXAMPLES, OUTPUTS)).astype(np.float32)
W = RANDOM.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
B = RANDOM.standard_normal(OUTPUTS).astype(np.float32)
PARAMS = {"fc": {"kernel": jnp.asarray(W), "bias": jnp.asarray(B)}}
EVERYTHING = {"fc/kernel": jnp.ones(W.shape, bool)}


def half_squared_error(params, batch):
    x, y = batch
    error = x @ params["fc"]["kernel"] + params["fc"]["bias"] - y
    return 0.5 * jnp.mean(jnp.sum(error * error, axis=-1))


def closed_form(weights=W, batch_size=1) -> np.ndarray:
    """Oracle: x (xW + b - y)ᵀ of each example in float64, averaged over groups."""
    x, y, w, b = (np.asarray(a, np.float64) for a in (X, Y, weights, B))
    each = np.einsum("ni,no->nio", x, x @ w + b - y)
    groups = EXAMPLES // batch_size
    each = each[: groups * batch_size].reshape(groups, batch_size, *w.shape)
    return each.mean(1)


def collect(
    loss_fn=half_squared_error,
    samples=(X, Y),
    masks=EVERYTHING,
    params=PARAMS,
    num_samples=EXAMPLES,
    batch_size=1,
    microbatch_size=8,
):
    """All rows, each in the shape of the kernel, and the lengths of the chunks."""
    order = flat_order(masks, {p: WeightAxes(m.shape) for p, m in masks.items()})
    problem = Problem(
        as_partial(loss_fn), params, masks, samples, order, num_samples, batch_size
    )
    chunks = list(row_chunks(problem, microbatch_size))
    assert all(chunk.dtype == jnp.float32 for chunk in chunks)
    rows = np.concatenate(chunks).reshape(-1, *W.shape)
    return rows, [len(chunk) for chunk in chunks]


def closed_form_is(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


# ------------------------------------------------------------------------- values


@pytest.mark.parametrize("microbatch_size", [1, 7, 64])
def test_per_sample_gradients_in_order_whatever_the_microbatch(microbatch_size) -> None:
    found, lengths = collect(microbatch_size=microbatch_size)
    closed_form_is(found, closed_form())
    assert max(lengths) <= microbatch_size
    fewer, _ = collect(num_samples=6, microbatch_size=microbatch_size)
    closed_form_is(fewer, closed_form()[:6])


@pytest.mark.parametrize("microbatch_size", [1, 3, 11, 64])
def test_a_group_of_m_has_the_gradient_of_the_mean(microbatch_size) -> None:
    m = 5
    found, _ = collect(num_samples=4, batch_size=m, microbatch_size=microbatch_size)
    closed_form_is(found, closed_form(batch_size=m))


def test_the_way_samples_are_batched_changes_nothing() -> None:
    cuts = [0, 2, 3, 11, 23]
    pieces = [(X[a:b], Y[a:b]) for a, b in pairwise(cuts)]
    whole, _ = collect()
    for samples in (pieces, iter(pieces), (piece for piece in pieces)):
        found, _ = collect(samples=samples)
        np.testing.assert_array_equal(found, whole)


def test_rows_of_one_batch_are_those_of_the_chunks_in_the_order_of_params() -> None:
    """The pure function that a caller composes with a step."""
    masks = {"fc/kernel": EVERYTHING["fc/kernel"], "fc/bias": jnp.ones(OUTPUTS, bool)}
    order = flat_order({path: masks[path] for path in ("fc/bias", "fc/kernel")})
    loss = as_partial(half_squared_error)
    chunks = row_chunks(Problem(loss, PARAMS, masks, (X, Y), order, EXAMPLES), 9)
    expected = np.concatenate(list(chunks))
    for rows_of in (gradient_rows, jax.jit(gradient_rows)):  # jit sorts dicts
        rows = rows_of(loss, PARAMS, masks, (X, Y))
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    kernel = expected[:, OUTPUTS:].reshape(-1, OUTPUTS, INPUTS).swapaxes(1, 2)
    closed_form_is(kernel, closed_form())


def test_pruned_weights_have_zero_gradient_and_others_their_own() -> None:
    mask = RANDOM.random(W.shape) < 0.5
    found, _ = collect(masks={"fc/kernel": jnp.asarray(mask)})
    assert (found[:, ~mask] == 0).all()
    closed_form_is(found[:, mask], closed_form()[:, mask])


def test_a_gradient_not_finite_at_a_pruned_weight_is_harmless() -> None:
    def loss(params, batch):
        root = jnp.sqrt(params["fc"]["kernel"][0, 0] ** 2)
        return half_squared_error(params, batch) + root

    params = {
        "fc": {"kernel": jnp.asarray(W).at[0, 0].set(0.0), "bias": PARAMS["fc"]["bias"]}
    }
    mask = jnp.ones(W.shape, bool).at[0, 0].set(False)
    found, _ = collect(loss, masks={"fc/kernel": mask}, num_samples=3, params=params)
    assert np.isfinite(found).all()


def test_gradients_of_half_precision_parameters_are_float32() -> None:
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
    found, _ = collect(num_samples=4, params=low)
    rounded = np.asarray(low["fc"]["kernel"].astype(jnp.float32))
    np.testing.assert_allclose(found, closed_form(rounded)[:4], rtol=0.05, atol=0.05)


def test_a_loss_with_new_contents_is_not_taken_for_the_old_one() -> None:
    def scaled(scale, params, batch):
        return scale * half_squared_error(params, batch)

    for wrap in (Partial, partial):
        one, two = (collect(wrap(scaled, scale))[0] for scale in (1.0, 2.0))
        np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_a_partial_passes_unchanged_and_a_function_is_wrapped() -> None:
    wrapped = as_partial(half_squared_error)
    assert isinstance(wrapped, Partial)
    assert as_partial(wrapped) is wrapped
    assert float(wrapped(PARAMS, (X, Y))) == float(half_squared_error(PARAMS, (X, Y)))


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("num_samples", "batch_size"), [(24, 1), (5, 5)])
def test_too_few_examples_are_an_error_with_both_numbers(
    num_samples, batch_size
) -> None:
    with pytest.raises(ValueError, match=f"num_samples={num_samples}") as caught:
        collect(num_samples=num_samples, batch_size=batch_size)
    assert f"batch_size={batch_size} need {num_samples * batch_size}" in str(
        caught.value
    )


def loss_nan_at(example: int, params, batch):
    x, _ = batch
    bad = jnp.any(x[:, 0] == jnp.asarray(X)[example, 0])
    return half_squared_error(params, batch) + jnp.where(bad, jnp.nan, 0.0)


@pytest.mark.parametrize("example", [0, 22])
def test_a_loss_that_is_not_finite_names_its_example(example) -> None:
    with pytest.raises(ValueError, match=rf"loss_fn.*nan at example {example} of"):
        collect(Partial(loss_nan_at, example))


@pytest.mark.parametrize("microbatch_size", [2, 9])
def test_a_loss_that_is_not_finite_names_the_group_it_is_in(microbatch_size) -> None:
    with pytest.raises(ValueError, match=r"nan at example 4 .*batch of 4"):
        collect(
            Partial(loss_nan_at, 6),
            num_samples=5,
            batch_size=4,
            microbatch_size=microbatch_size,
        )


def test_a_gradient_that_is_not_finite_names_its_parameter() -> None:
    def loss(params, batch):
        zero = jnp.sum(0 * params["fc"]["kernel"])
        return half_squared_error(params, batch) + jnp.sqrt(zero)

    with pytest.raises(ValueError, match=r"gradient of 'fc/kernel' is not finite"):
        collect(loss, num_samples=3)


# ------------------------------------------------------------------------- labels


def test_labels_are_drawn_with_the_model_s_own_probabilities() -> None:
    shares = np.asarray([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.0, 0.9]])
    many = 20_000
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(shares) + 7.0, jnp.float32)
    logits = jnp.broadcast_to(logits, (many, 2, 4))
    drawn = sample_labels(jax.random.key(0), logits)
    assert drawn.shape == (many, 2)
    assert drawn.dtype == jnp.int32
    for column, expected in zip(np.asarray(drawn).T, shares, strict=True):
        found = np.bincount(column, minlength=4) / many
        np.testing.assert_allclose(found, expected, atol=0.015)
        assert found[expected == 0].sum() == 0
    np.testing.assert_array_equal(drawn, sample_labels(jax.random.key(0), logits))
    assert (drawn != sample_labels(jax.random.key(1), logits)).any()
