"""The original's own output, and its formulas in float64, on its own checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax import METHODS, Problem, init_masks, prune
from woodfisher_jax.curvature.inverse import InverseFisher
from woodfisher_jax.equations.obs import obs_direction, obs_saliency
from woodfisher_jax.rows.gradients import as_partial
from woodfisher_jax.trees.blocks import flat_order, flatten, unflatten
from woodfisher_jax.trees.paths import leaves_by_path

LAYERS = ("fc1", "fc2", "fc3")
DAMPING = 1e-5


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    with np.load(golden_dir / "wfblock_c2000_N100_sp95.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(checkpoints_dir: Path) -> dict[str, np.ndarray]:
    """Weights of the trained MLP in PyTorch layout (out, in)."""
    with np.load(checkpoints_dir / "mnist_mlpnet_93.97.npz") as file:
        return {name: file[f"module.{name}._layer.weight"] for name in LAYERS}


@pytest.fixture(scope="module")
def examples(golden, tfds_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The original's 100 training examples, in its order."""
    return read_examples(golden, tfds_dir)


def read_examples(golden, tfds_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tfds.data_source("mnist", split="train", data_dir=tfds_dir)
    records = source.__getitems__(golden["tfds_train_index"].tolist())
    pixels = np.stack([r["image"] for r in records]).reshape(len(records), -1)
    inputs = (pixels.astype(np.float64) / 255 - 0.1307) / 0.3081
    return inputs.astype(np.float32), np.asarray([r["label"] for r in records])


def golden_mask(golden: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The original's mask of a layer, flat."""
    size = int(np.prod(golden[f"shape_{name}"]))
    return np.unpackbits(golden[f"mask_{name}"], count=size).astype(bool)


def torch_loss(params, batch):
    """Negative log-likelihood with weights as PyTorch has them."""
    hidden, labels = batch
    for name in LAYERS:
        hidden = hidden @ params[name].T
        hidden = jax.nn.relu(hidden) if name != LAYERS[-1] else hidden
    logs = jax.nn.log_softmax(hidden)
    return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1))


def flax_loss(params, batch):
    return torch_loss({name: params[name]["kernel"].T for name in LAYERS}, batch)


def to_torch(tree: dict, layout: str) -> dict[str, np.ndarray]:
    """Arrays of params or masks, by layer and in PyTorch layout."""
    leaves = leaves_by_path(tree)
    if layout == "torch":
        return {name: np.asarray(leaves[name]) for name in LAYERS}
    return {name: np.asarray(leaves[f"{name}/kernel"]).T for name in LAYERS}


def run(weights, examples, layout: str, **options):
    params = {name: jnp.asarray(w) for name, w in weights.items()}
    loss_fn = torch_loss
    if layout == "flax":
        params = {name: {"kernel": w.T} for name, w in params.items()}
        loss_fn = flax_loss
    new_params, new_masks, info = prune(loss_fn, params, examples, **options)
    return to_torch(new_params, layout), to_torch(new_masks, layout), info


@pytest.mark.parametrize(
    "layout", ["torch", pytest.param("flax", marks=pytest.mark.slow)]
)
def test_the_original_s_masks_and_weights(golden, weights, examples, layout) -> None:
    new_weights, masks, info = run(
        weights,
        examples,
        layout,
        method="woodfisherblock",
        sparsity=0.95,
        damping=DAMPING,
        block_size=2000,
    )
    assert info.num_samples == 100
    assert info.nonzero == 1_618
    differ = 0
    for name in LAYERS:
        mask = golden_mask(golden, name).reshape(golden[f"shape_{name}"])
        # Its comparison is strict, so that it may lose one weight, and never gains.
        assert not (mask & ~masks[name]).any()
        differ += int((masks[name] & ~mask).sum())
        expected = golden[f"after_{name}"][mask]
        np.testing.assert_allclose(new_weights[name][mask], expected, rtol=1e-5)
        assert (new_weights[name][~masks[name]] == 0).all()
    assert differ <= 1


# ------------------------------------------------------------ the original in float64


def activations(weights, examples) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs and output gradients of each layer, by hand, [examples, in or out]."""
    inputs, labels = examples
    w1, w2, w3 = (weights[name].astype(np.float64) for name in LAYERS)
    h0 = inputs.astype(np.float64)
    h1 = np.maximum(h0 @ w1.T, 0)
    h2 = np.maximum(h1 @ w2.T, 0)
    logits = h2 @ w3.T
    d3 = np.exp(logits - logits.max(1, keepdims=True))
    d3 /= d3.sum(1, keepdims=True)
    d3[np.arange(len(labels)), labels] -= 1
    d2 = (d3 @ w3) * (h2 > 0)
    d1 = (d2 @ w2) * (h1 > 0)
    return dict(zip(LAYERS, ((h0, d1), (h1, d2), (h2, d3)), strict=True))


def per_sample_gradients(weights, examples) -> dict[str, np.ndarray]:
    """Backpropagation by hand, [examples, out, in]."""
    layers = activations(weights, examples).items()
    return {name: np.einsum("no,ni->noi", d, a) for name, (a, d) in layers}


def sample_space(rows: np.ndarray, damping: float):
    """diag(F⁻¹) and v -> F⁻¹v of one block: F⁻¹ = (I - Gᵀ(λN I + GGᵀ)⁻¹G) / λ."""
    count = len(rows)
    system = damping * count * np.eye(count) + rows @ rows.T
    solved = np.linalg.solve(system, rows)
    diagonal = (1 - np.sum(rows * solved, axis=0)) / damping
    return diagonal, lambda v: (v - rows.T @ (solved @ v)) / damping


def top_masks(
    stats: dict[str, np.ndarray], sparsity: float, layerwise: bool
) -> dict[str, np.ndarray]:
    """The floor(n (1 - s)) highest, in each layer or in all."""

    def threshold(values):
        kept = int(np.floor(round(len(values) * (1 - sparsity), 6)))
        ranked = np.sort(values)[::-1]
        assert ranked[kept - 1] > ranked[kept] * (1 + 1e-5), "too close to call"
        return ranked[kept - 1]

    joined = np.concatenate([stat.reshape(-1) for stat in stats.values()])
    joint = None if layerwise else threshold(joined)
    return {
        name: stat >= (threshold(stat.reshape(-1)) if layerwise else joint)
        for name, stat in stats.items()
    }


def original_step(
    weights: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    sparsity: float,
    damping: float,
    block_size: int | None,
    layerwise: bool,
) -> tuple[dict, dict]:
    """`woodfisherblock` in float64, with floor(n (1 - s)) weights kept."""
    stats, solves = {}, {}
    for name, w in weights.items():
        rows = gradients[name].reshape(len(gradients[name]), -1)
        width = block_size or w.size
        chunks = [slice(i, i + width) for i in range(0, w.size, width)]
        solves[name] = [(c, *sample_space(rows[:, c], damping)) for c in chunks]
        diagonal = np.concatenate([d for _, d, _ in solves[name]])
        stats[name] = w.reshape(-1).astype(np.float64) ** 2 / (diagonal + 1e-10) + 1e-10

    masks = top_masks(stats, sparsity, layerwise)
    new_weights = {}
    for name, w in weights.items():
        mask = masks[name]
        moved = w.reshape(-1).astype(np.float64)
        for chunk, diagonal, solve in solves[name]:
            b = -np.where(mask[chunk], 0, moved[chunk]) / diagonal
            moved[chunk] = moved[chunk] + solve(b)
        masks[name] = mask.reshape(w.shape)
        new_weights[name] = (moved * mask).reshape(w.shape)
    return new_weights, masks


def assert_same(found, expected, rtol: float) -> None:
    """Kept weights by relative size, but near zero by the size of a usual weight."""
    new_weights, masks = found[:2]
    expected_weights, expected_masks = expected
    for name, mask in expected_masks.items():
        np.testing.assert_array_equal(masks[name], mask)
        usual = np.abs(expected_weights[name][mask]).mean()
        np.testing.assert_allclose(
            new_weights[name], expected_weights[name], rtol=rtol, atol=rtol * usual
        )


@pytest.mark.parametrize(
    ("block_size", "scope", "sparsity", "batch_size", "layout"),
    [
        pytest.param(784, "layer", 0.8, 1, "torch", marks=pytest.mark.slow),
        pytest.param(500, "global", 0.9, 10, "flax", marks=pytest.mark.slow),
        # Slow tests compile with optimizations, without which a weight rounds worse.
        pytest.param(None, "global", 0.95, 1, "torch", marks=pytest.mark.slow),
    ],
)
def test_the_original_s_formulas_in_float64(
    weights, examples, block_size, scope, sparsity, batch_size, layout
) -> None:
    gradients = {
        name: g.reshape(-1, batch_size, *g.shape[1:]).mean(1)
        for name, g in per_sample_gradients(weights, examples).items()
    }
    expected = original_step(
        weights, gradients, sparsity, DAMPING, block_size, scope == "layer"
    )
    found = run(
        weights,
        examples,
        layout,
        method="woodfisherblock",
        sparsity=sparsity,
        scope=scope,
        damping=DAMPING,
        block_size=block_size,
        batch_size=batch_size,
    )
    assert found[2].num_samples == 100 // batch_size
    assert_same(found, expected, rtol=2e-5)


# --------------------------------------------------------------------- the first order


def strictly_above(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """The original's mask: above the k-th highest, k = ceil(n (1 - s))."""
    number = int(np.ceil(len(scores) * (1 - sparsity)))
    return scores > np.sort(scores)[len(scores) - number]


@pytest.mark.slow
def test_the_original_s_woodtaylorblock(
    golden_dir, weights, checkpoints_dir, tfds_dir
) -> None:
    with np.load(golden_dir / "wtblock_c2000_N100_sp80.npz") as file:
        golden = dict(file)
    samples = read_examples(golden, tfds_dir)
    params = {name: jnp.asarray(weights[name]) for name in LAYERS}
    method = METHODS["woodtaylorblock"].replace(damping=0.1, block_size=2000)
    masks = init_masks(params)
    order = flat_order(masks)
    w = flatten(order, params)
    number = len(jax.tree.leaves(samples)[0])
    problem = Problem(as_partial(torch_loss), params, masks, samples, order, number)
    with method.build(problem).curvature as fisher:
        assert isinstance(fisher, InverseFisher)
        diagonal = fisher.diagonal().value
        mean = fisher.slope(-jnp.ones(number))
        newton = fisher.product(mean).value
        scores = np.asarray(obs_saliency(w - newton, diagonal), np.float64)
        # The original shifts every layer by its own minimum.
        parts = np.split(scores, order.offsets[1:-1])
        shifted = np.concatenate([part - part.min() + 1e-10 for part in parts])
        kept = np.concatenate([golden_mask(golden, name) for name in LAYERS])
        differ = kept != strictly_above(shifted, 0.8)
        # Its float32 scores hold -γ/2 of up to 0.86, whose rounding decides there.
        threshold = shifted[kept].min()
        assert np.abs(shifted[differ] - threshold).max(initial=0) < 1e-7
        assert differ.sum() <= 2
        direction = obs_direction(w - newton, diagonal, jnp.asarray(~kept)) - mean
        moved = unflatten(order, w + fisher.product(direction).value)
    for name in LAYERS:
        mask = golden_mask(golden, name).reshape(golden[f"shape_{name}"])
        np.testing.assert_allclose(
            np.asarray(moved[name])[mask], golden[f"after_{name}"][mask], rtol=1e-4
        )


# -------------------------------------------------------------------- Kronecker factors


def original_kfac(weights, examples, sparsity, damping, pi, layerwise):
    """`kfac` in float64: (A + √(λπ) I)⁻¹ and (G + √(λ/π) I)⁻¹ of each layer."""
    stats, diagonals, inverses = {}, {}, {}
    for name, (inputs, outputs) in activations(weights, examples).items():
        a = inputs.T @ inputs / len(inputs)
        g = outputs.T @ outputs / len(outputs)
        ratio = (np.trace(a) / len(a)) / (np.trace(g) / len(g)) if pi else 1.0
        a = np.linalg.inv(a + np.sqrt(damping * ratio) * np.eye(len(a)))
        g = np.linalg.inv(g + np.sqrt(damping / ratio) * np.eye(len(g)))
        inverses[name] = g, a
        diagonals[name] = np.outer(np.diag(g), np.diag(a))
        stats[name] = weights[name].astype(np.float64) ** 2 / diagonals[name]
    masks = top_masks(stats, sparsity, layerwise)
    new = {}
    for name, (g, a) in inverses.items():
        b = np.where(masks[name], 0, -weights[name] / diagonals[name])
        new[name] = (weights[name] + g @ b @ a) * masks[name]
    return new, masks


@pytest.mark.parametrize(
    ("pi", "scope", "layout"),
    [
        pytest.param(
            *case,
            marks=[pytest.mark.slow] * (case != (True, "global", "torch")),
        )
        for case in [
            (pi, scope, layout)
            for pi, scope in [(False, "global"), (True, "global"), (False, "layer")]
            for layout in ("torch", "flax")
        ]
    ],
)
def test_the_original_s_kfac_in_float64(weights, examples, layout, pi, scope) -> None:
    expected = original_kfac(weights, examples, 0.95, DAMPING, pi, scope == "layer")
    found = run(
        weights,
        examples,
        layout,
        sparsity=0.95,
        method="kfac",
        damping=DAMPING,
        pi=pi,
        scope=scope,
    )
    assert_same(found, expected, rtol=2e-5)


# ------------------------------------------------------------------------ convolutions

CONV_SHAPES = {  # OIHW, as in ResNet-20
    "conv1": (16, 3, 3, 3),
    "layer2.0.conv1": (32, 16, 3, 3),
    "layer2.0.downsample.0": (32, 16, 1, 1),
    "fc": (10, 64),
}


def to_flax(array: np.ndarray, lead: int = 0) -> np.ndarray:
    """OIHW -> HWIO and (out, in) -> (in, out), behind ``lead`` other axes."""
    order = (2, 3, 1, 0) if array.ndim - lead == 4 else (1, 0)
    return np.transpose(array, (*range(lead), *(lead + axis for axis in order)))


@pytest.mark.slow
def test_chunks_of_convolutions_hold_the_weights_they_hold_in_pytorch() -> None:
    random = np.random.default_rng(0)
    torch_weights, torch_gradients = {}, {}
    for name, shape in CONV_SHAPES.items():
        torch_weights[name] = random.standard_normal(shape).astype(np.float32)
        # Gradients go together within an output channel, so that blocks matter.
        pull = random.standard_normal((20, shape[0], *[1] * (len(shape) - 1)))
        rows = pull * random.standard_normal(shape)
        rows = rows + 0.3 * random.standard_normal((20, *shape))
        torch_gradients[name] = rows.astype(np.float32)
    expected = original_step(
        torch_weights,
        {n: g.astype(np.float64) for n, g in torch_gradients.items()},
        sparsity=0.8,
        damping=1e-2,
        block_size=500,
        layerwise=False,
    )

    def loss_fn(params, batch):
        return jnp.mean(
            sum(
                jnp.sum(params[n]["kernel"] * g, axis=tuple(range(1, g.ndim)))
                for n, g in batch.items()
            )
        )

    params = {n: {"kernel": jnp.asarray(to_flax(w))} for n, w in torch_weights.items()}
    new_params, new_masks, _ = prune(
        loss_fn,
        params,
        {n: to_flax(g, lead=1) for n, g in torch_gradients.items()},
        sparsity=0.8,
        method="woodfisherblock",
        damping=1e-2,
        block_size=500,
    )
    back = lambda a: np.transpose(a, (3, 2, 0, 1) if a.ndim == 4 else (1, 0))  # noqa: E731
    found = (
        {n: back(new_params[n]["kernel"]) for n in CONV_SHAPES},
        {n: back(new_masks[f"{n}/kernel"]) for n in CONV_SHAPES},
    )
    assert_same(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_flax_convolution_has_the_gradient_of_the_pytorch_one() -> None:
    nn = pytest.importorskip("flax.linen")
    random = np.random.default_rng(1)
    images = random.standard_normal((12, 5, 5, 2)).astype(np.float32)
    targets = random.standard_normal((12, 3, 3, 4)).astype(np.float32)
    model = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)
    kernel = random.standard_normal((4, 2, 3, 3)).astype(np.float32)  # OIHW

    def loss_fn(params, batch):
        out = model.apply({"params": params}, batch[0])
        return 0.5 * jnp.mean(jnp.sum(out * batch[1], axis=(1, 2, 3)) ** 2)

    new_params, new_masks, _ = prune(
        loss_fn,
        {"kernel": jnp.asarray(to_flax(kernel))},
        (images, targets),
        sparsity=0.5,
        method="woodfisherblock",
        damping=1e-2,
        block_size=10,
    )
    # Cross-correlation written out: y[n,i,j,o] = Σ w[o,c,a,b] x[n,i+a,j+b,c].
    patches = np.stack(
        [
            np.stack([images[:, a : a + 3, b : b + 3] for b in range(3)], -1)
            for a in range(3)
        ],
        -2,
    ).astype(np.float64)
    slopes = np.einsum("nijcab,nijo->nocab", patches, targets)
    values = np.einsum("nocab,ocab->n", slopes, kernel)
    expected = original_step(
        {"conv": kernel},
        {"conv": values[:, None, None, None, None] * slopes},
        sparsity=0.5,
        damping=1e-2,
        block_size=10,
        layerwise=False,
    )
    found = (
        {"conv": np.transpose(new_params["kernel"], (3, 2, 0, 1))},
        {"conv": np.transpose(new_masks["kernel"], (3, 2, 0, 1))},
    )
    assert_same(found, expected, rtol=1e-4)
