"""Over every damping and scale the curvature is right to 1e-5, or refused.

To 1e-4 where the condition number exceeds 1e9.

The oracle is the singular value decomposition of the stacked matrix [G / √N; √λ I],
whose condition number is the square root of the Fisher's: it is good to about 1e-9
where forming F itself in float64 loses everything (checked against 80-digit decimals).
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax.curvature import checked
from woodfisher_jax.curvature.checked import (
    TOLERANCE,
    CurvatureError,
    checked_blocks,
    inverse_diagonals,
    inverse_products,
    run_blocks,
)
from woodfisher_jax.curvature.groups import parts_of
from woodfisher_jax.equations.fisher import SOLVERS, WORST, choose_solver
from woodfisher_jax.rows.budget import block_bytes, factor_bytes
from woodfisher_jax.selection.patterns import Groups

WIDTH = 24
COUNTS = (8, 24, 40)  # N < c, N = c, N > c
DAMPINGS = (1e-8, 1e-5, 1e-2, 1.0)
SCALES = (1e-3, 1.0, 1e3)
ACCURACY, WITHIN_REACH = 1e-5, 1e9
WITHOUT_RECURSION = [
    pytest.param(solver, marks=[pytest.mark.slow] * (solver == "recursion"))
    for solver in SOLVERS
]
"""Among the quick tests: nothing but ``solver="recursion"`` chooses it."""


def svd_inverse(gradients: np.ndarray, damping: float) -> np.ndarray:
    """Oracle: F⁻¹ = A⁺A⁺ᵀ with A = [G / √N; √λ I], of one block or several."""
    g = np.asarray(gradients, np.float64)
    identity = np.broadcast_to(np.eye(g.shape[-1]), (*g.shape[:-2], *2 * g.shape[-1:]))
    stacked = [g / np.sqrt(g.shape[-2]), np.sqrt(damping) * identity]
    _, values, right = np.linalg.svd(np.concatenate(stacked, -2), full_matrices=False)
    root = np.swapaxes(right, -1, -2) / values[..., None, :]
    return root @ np.swapaxes(root, -1, -2)


def errors(gradients, damping, solver) -> np.ndarray:
    """Relative errors [blocks, 2] of diagonals (worst entry) and of products (largest).

    NaN where the result is refused.
    """
    number, _, width = gradients.shape
    inverse = svd_inverse(gradients, np.float32(damping))
    vectors = np.random.default_rng(0).standard_normal((number, width))
    vectors = vectors.astype(np.float32)
    blocks = jnp.asarray(gradients, jnp.float32)
    strength = np.float32(damping)
    diagonals = run_blocks(checked.diagonal, blocks, (), strength, solver)
    given = (vectors, diagonals.factor)
    products = run_blocks(checked.product, blocks, given, strength, solver)
    assert diagonals.value.dtype == products.value.dtype == jnp.float32
    exact = np.diagonal(inverse, axis1=1, axis2=2)
    off = np.max(np.abs(np.float64(diagonals.value) - exact) / exact, axis=1)
    exact = np.einsum("bij,bj->bi", inverse, vectors)
    change = np.max(np.abs(np.float64(products.value) - exact), axis=1)
    found = np.stack([off, change / np.max(np.abs(exact), axis=1)], 1)
    estimates = np.stack([diagonals.error, products.error], 1)
    return np.where(estimates <= TOLERANCE, found, np.nan)


# ------------------------------------------------------------------ kinds of gradients


def plain(random, count):
    return random.standard_normal((count, WIDTH))


def duplicates(random, count):
    """Each sample four times over."""
    return plain(random, count)[random.integers(0, max(1, count // 4), count)]


def one_outlier(random, count):
    rows = 1e-3 * plain(random, count)
    rows[0] *= 1e6
    return rows


def sparse_columns(random, count):
    """Dead inputs, and inputs seen in a few samples only."""
    rows = plain(random, count) * (random.random((count, WIDTH)) < 0.1)
    return rows * (random.random(WIDTH) < 0.5)


def common_mean_but_one(random, count):
    """All samples pull the same way but for a single weight."""
    rows = np.tile(random.standard_normal(WIDTH), (count, 1))
    rows[1:, WIDTH // 2] += 1e-3 * random.standard_normal(count - 1)
    return rows


KINDS = {
    "plain": plain,
    "duplicates": duplicates,
    "near duplicates": lambda r, n: duplicates(r, n) + 1e-4 * plain(r, n),
    "low rank": lambda r, n: r.standard_normal((n, 3)) @ r.standard_normal((3, WIDTH)),
    # Samples from hard to long learnt.
    "graded rows": lambda r, n: plain(r, n) * np.logspace(0, -6, n)[:, None],
    "one outlier": one_outlier,
    "graded columns": lambda r, n: plain(r, n) * np.logspace(0, -6, WIDTH),
    "sparse columns": sparse_columns,
    # All samples pull the same way; they differ in the fourth digit.
    "common mean": lambda r, n: 1 + 1e-3 * plain(r, n),
    "common mean but one": common_mean_but_one,
    "heavy tails": lambda r, n: r.standard_t(1, (n, WIDTH)),
}
CASES = [(kind, scale) for kind in KINDS for scale in SCALES]


@functools.cache
def sweep(solver: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of all dampings and cases, and their errors [dampings, cases, 2]."""
    rows = np.empty((len(DAMPINGS), len(CASES), count, WIDTH))
    for (d, damping), (c, (kind, scale)) in itertools.product(
        enumerate(DAMPINGS), enumerate(CASES)
    ):
        number = [*KINDS].index(kind)
        seed = [number, count, int(1e6 * scale), int(1e8 * damping)]
        rows[d, c] = scale * KINDS[kind](np.random.default_rng(seed), count)
    found = [
        errors(np.float32(r), d, solver) for r, d in zip(rows, DAMPINGS, strict=True)
    ]
    return rows, np.stack(found)


def conditions(gradients: np.ndarray) -> np.ndarray:
    """Condition numbers of F, [dampings, cases]."""
    norms = np.linalg.norm(gradients, 2, axis=(2, 3))
    return 1 + norms**2 / gradients.shape[2] / np.array(DAMPINGS)[:, None]


def described(where: np.ndarray) -> str:
    return "\n".join(
        f"{CASES[c][0]} scale={CASES[c][1]} damping={DAMPINGS[d]}"
        for d, c in np.argwhere(where)
    )


@pytest.mark.parametrize(
    "count",
    [COUNTS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in COUNTS[1:])],
)
@pytest.mark.parametrize("solver", WITHOUT_RECURSION)
def test_never_silently_wrong(solver, count) -> None:
    gradients, found = sweep(solver, count)
    within = conditions(gradients) < WITHIN_REACH
    most = np.where(within, ACCURACY, 10 * ACCURACY)
    wrong = np.any(found > most[..., None], axis=2)  # NaN, refused, is not
    assert not wrong.any(), described(wrong)


@pytest.mark.parametrize(
    "count",
    [COUNTS[0], pytest.param(COUNTS[1], marks=pytest.mark.slow), *COUNTS[2:]],
)
def test_the_chosen_solver_refuses_nothing_that_is_within_reach(count) -> None:
    gradients, found = sweep(choose_solver(count, WIDTH), count)
    within = conditions(gradients) < WITHIN_REACH
    refused = within & np.isnan(found).any(axis=2)
    assert not refused.any(), described(refused)
    assert np.isnan(found).any()  # so that both outcomes are tested


def in_one_weight(random, width):
    """Samples that differ in one weight only, by about the damping."""
    rows = np.tile(1 + 0.3 * random.standard_normal(width), (20, 1))
    rows[1:, width // 2] += np.sqrt(2e-5)
    return rows


WIDE_KINDS = {
    "one weight": in_one_weight,
    "common mean": lambda r, w: 1 + 1e-3 * r.standard_normal((20, w)),
    "near duplicates": lambda r, w: (
        np.repeat(r.standard_normal((5, w)), 4, 0) + 1e-4 * r.standard_normal((20, w))
    ),
    "equal weights": lambda r, w: np.tile(r.standard_normal((20, 10)), w // 10),
    # More weights with leverage near 1 than are refined.
    "large weights": lambda r, w: (
        r.standard_normal((20, w)) * np.where(np.arange(w) < 100, 10.0, 1e-3)
    ),
}


def test_entries_that_stay_in_float32_are_right_as_well() -> None:
    width = 200
    assert width > 2 * WORST
    every = [
        scale * kind(np.random.default_rng(3), width)
        for kind in WIDE_KINDS.values()
        for scale in (1.0, 4.0)
    ]
    found = errors(np.float32(every), 1e-5, "sample_space")
    assert not np.any(found > ACCURACY), found
    assert not np.isnan(found[::2]).any()


# --------------------------------------------------------------------- real gradients


@pytest.fixture(scope="module")
def mnist_gradients(tfds_dir: Path, checkpoints_dir: Path) -> dict[str, np.ndarray]:
    """Gradients of the trained MLP at 300 training images, in PyTorch order."""
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tfds.data_source("mnist", split="train", data_dir=tfds_dir)
    records = source.__getitems__(range(300))
    images = np.stack([r["image"] for r in records]).reshape(300, -1)
    inputs = (images / 255.0 - 0.1307) / 0.3081
    with np.load(checkpoints_dir / "mnist_mlpnet_93.97.npz") as file:
        w1, w2, w3 = (
            file[f"module.fc{i}._layer.weight"].astype(np.float64) for i in (1, 2, 3)
        )
    h1 = np.maximum(inputs @ w1.T, 0)
    h2 = np.maximum(h1 @ w2.T, 0)
    logits = h2 @ w3.T
    d3 = np.exp(logits - logits.max(1, keepdims=True))
    d3 /= d3.sum(1, keepdims=True)
    d3[np.arange(300), [r["label"] for r in records]] -= 1
    d2 = (d3 @ w3) * (h2 > 0)
    d1 = (d2 @ w2) * (h1 > 0)
    outer = lambda d, a: np.einsum("no,ni->noi", d, a).reshape(300, -1)  # noqa: E731
    found = {"fc1": outer(d1, inputs), "fc2": outer(d2, h1), "fc3": outer(d3, h2)}
    # Chunks of one width, to compile once; those of fc1 from the middle of the image.
    found["fc1"] = found["fc1"][:, 2000:2400]
    found["fc2"] = found["fc2"][:, :400]
    return {name: rows.astype(np.float32) for name, rows in found.items()}


@pytest.mark.parametrize(
    ("layer", "solver", "count"),
    [
        pytest.param("fc1", "sample_space", 100, marks=pytest.mark.slow),
        pytest.param("fc1", "sample_space", 300, marks=pytest.mark.slow),
        pytest.param("fc2", "sample_space", 100, marks=pytest.mark.slow),
        pytest.param("fc2", "sample_space", 300, marks=pytest.mark.slow),
        pytest.param("fc3", "sample_space", 100),
        pytest.param("fc3", "dense", 300, marks=pytest.mark.slow),
        pytest.param("fc3", "recursion", 300, marks=pytest.mark.slow),
    ],
)
def test_real_gradients_over_every_damping(
    mnist_gradients, layer, solver, count
) -> None:
    for scale, damping in ((1.0, 1e-8), (1.0, 1e-5), (1e3, 1e-5)):
        rows = scale * mnist_gradients[layer][None, :count]
        (found,) = errors(rows, damping, solver)
        assert not np.any(found > ACCURACY), f"{scale=} {damping=}: {found}"
        # The published setting must work, not just not be wrong.
        if scale == 1 and damping >= 1e-5 and solver == "sample_space":
            assert not np.isnan(found).any()


# ------------------------------------------------------------------ many blocks at once


def blocks_of(number: int, count: int = 8, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(7)
    return (scale * random.standard_normal((number, count, WIDTH))).astype(np.float32)


GRADIENTS, VECTORS = blocks_of(4), blocks_of(1, count=4)[0]
NAMES = ["fc1", "fc2", "fc3", "fc4"]


@pytest.mark.parametrize("solver", WITHOUT_RECURSION)
def test_each_block_has_its_own_inverse_and_its_factor_serves_the_product(
    solver,
) -> None:
    inverse = svd_inverse(GRADIENTS, 1e-2)
    diagonals = inverse_diagonals(GRADIENTS, 1e-2, solver, NAMES)
    expected = np.diagonal(inverse, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonals, expected, rtol=1e-5)
    products = inverse_products(GRADIENTS, 1e-2, VECTORS, solver, NAMES)
    expected = np.einsum("bij,bj->bi", inverse, VECTORS)
    np.testing.assert_allclose(products, expected, atol=1e-5 * abs(expected).max())
    found = checked_blocks(checked.diagonal, GRADIENTS, (), 1e-2, solver, NAMES)
    np.testing.assert_array_equal(found.value, diagonals)
    assert found.factor.nbytes == 4 * factor_bytes(8, WIDTH, solver)
    given = (VECTORS, found.factor)
    again = checked_blocks(checked.product, GRADIENTS, given, 1e-2, solver, NAMES)
    np.testing.assert_allclose(again.value, products, atol=1e-5 * abs(expected).max())


def test_a_product_with_zero_is_zero() -> None:
    zeros = jnp.zeros((4, WIDTH))
    found = inverse_products(GRADIENTS, 1e-2, zeros, "sample_space", NAMES)
    np.testing.assert_array_equal(found, zeros)


@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_that_an_accelerator_takes_together_are_the_same(
    solver, monkeypatch
) -> None:
    arrays = (GRADIENTS, (VECTORS,), np.float32(1e-2))
    one_by_one = run_blocks(checked.product, *arrays, solver)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda blocks, cpu, default: default(blocks)
    )
    monkeypatch.setattr(checked, "BATCH_BYTES", 2 * block_bytes(8, WIDTH, solver))
    together = jax.jit(run_blocks.__wrapped__, static_argnums=(0, 4))
    found = together(checked.product, *arrays, solver)
    np.testing.assert_allclose(found.value, one_by_one.value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_working_memory_grows_with_what_it_holds(solver) -> None:
    small = block_bytes(10, 20, solver)
    assert small >= 4 * 10 * 20
    assert block_bytes(20, 20, solver) > small < block_bytes(10, 40, solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_block_that_cannot_be_inverted_names_its_tensor_and_a_remedy(solver) -> None:
    gradients = GRADIENTS.copy()
    gradients[1] = 1e6
    gradients[1, :, 3:] += np.arange(WIDTH - 3)
    for attempt in (
        lambda: inverse_diagonals(gradients, 1e-9, solver, NAMES),
        lambda: inverse_products(gradients, 1e-9, VECTORS, solver, NAMES),
    ):
        with pytest.raises(CurvatureError) as caught:
            attempt()
        for part in ("'fc2'", "of 4 blocks", "raise damping", solver, "24"):
            assert part in str(caught.value)


@pytest.mark.parametrize("solver", ["sample_space", "recursion"])
def test_a_fisher_of_full_rank_is_left_to_the_dense_solver(solver) -> None:
    rows = np.random.default_rng(0).standard_normal((1, 100, WIDTH)).astype(np.float32)
    with pytest.raises(CurvatureError, match="take solver='dense'"):
        inverse_diagonals(rows, 1e-14, solver, ["w"])
    inverse = np.linalg.inv(rows[0].T.astype(float) @ rows[0].astype(float) / 100)
    found = np.asarray(inverse_diagonals(rows, 1e-14, "dense", ["w"]))
    np.testing.assert_allclose(found[0], np.diagonal(inverse), rtol=1e-5)


# ------------------------------------------------------------ other formulas of a block


def joint_oracle(gradients, weights, kept, damping):
    """The kept weights at the minimum of the quadratic model, in float64."""
    g, w = gradients.astype(np.float64), weights.astype(np.float64)
    fisher = damping * np.eye(WIDTH) + g.T @ g / len(g)
    step = np.where(kept, 0.0, -w)
    inside = fisher[np.ix_(kept, kept)]
    step[kept] = np.linalg.solve(inside, -(fisher @ step)[kept])
    return step


def test_the_joint_update_of_gradients_that_almost_repeat() -> None:
    gradients = np.repeat(1e3 * GRADIENTS[:1], 4, axis=0)
    gradients[1, 4:] = gradients[1, :4] * (1 + 1e-7 * np.arange(WIDTH))
    kept = np.tile(np.arange(WIDTH) % 2 == 0, (4, 1))
    others = (VECTORS, kept, np.zeros((4, 8), np.float32))
    given = jnp.asarray(gradients), others
    found = checked_blocks(checked.joint, *given, 1e-2, "sample_space", NAMES)
    for block in range(4):
        one = gradients[block], VECTORS[block], kept[block]
        expected = joint_oracle(*one, np.float32(1e-2))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.value[block], expected, atol=1e-5 * scale)
    with pytest.raises(CurvatureError, match="raise damping"):
        checked_blocks(checked.joint, *given, 1e-20, "sample_space", NAMES)


def group_saliencies(scale: float, damping: float, gradients=GRADIENTS):
    """ρ of groups of four weights in blocks from well to ill conditioned."""
    gradients = gradients * scale * 30.0 ** np.arange(4)[:, None, None]
    of, slots = np.divmod(np.arange(4 * WIDTH), 4)
    groups = Groups(of, slots, WIDTH, np.zeros(WIDTH), None)
    (part,) = parts_of(np.arange(4 * WIDTH).reshape(4, WIDTH), groups)
    given = (VECTORS, part.columns)
    task, solver = checked.whole_groups, "sample_space"
    gradients = gradients.astype(np.float32)
    found = checked_blocks(task, gradients, given, damping, solver, NAMES)
    return gradients, np.asarray(found.value)


@pytest.mark.parametrize("damping", [1e-5, 1e-3])
def test_groups_of_blocks_from_well_to_ill_conditioned(damping) -> None:
    gradients, found = group_saliencies(1e-3, damping)
    inverse = svd_inverse(gradients, damping)
    for block, group in np.ndindex(4, WIDTH // 4):
        members = slice(4 * group, 4 * group + 4)
        part = VECTORS[block, members].astype(np.float64)
        expected = part @ np.linalg.solve(inverse[block, members, members], part) / 2
        np.testing.assert_allclose(found[block, group], expected, rtol=1e-3)


def test_groups_of_a_block_that_cannot_be_inverted_are_refused() -> None:
    with pytest.raises(CurvatureError, match=r"raise damping"):
        group_saliencies(1e8, 1e-12, np.repeat(GRADIENTS[:, ::2], 2, axis=1))
