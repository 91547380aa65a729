"""A step on a network of two layers, against float64.

What can be tested with injected gradients is in test_prune; here is what needs layers,
a Hessian, a slope or several steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from woodfisher_jax import METHODS, plan_pruning, prune
from woodfisher_jax.methods import applicable
from woodfisher_jax.rows import budget
from woodfisher_jax.trees.paths import leaves_by_path

RANDOM = np.random.default_rng(0)
SHAPES = {"l1": (5, 4), "l2": (4, 3)}
PARAMS = {
    name: {"kernel": RANDOM.standard_normal(shape).astype(np.float32)}
    for name, shape in SHAPES.items()
}
X = RANDOM.standard_normal((24, 5)).astype(np.float32)
Y = RANDOM.standard_normal((24, 3)).astype(np.float32)
MASKS = {f"{name}/kernel": RANDOM.random(shape) < 0.8 for name, shape in SHAPES.items()}
SIZES = [20, 12]
DAMPING = 0.1


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["l1"]["kernel"])
    errors = hidden @ params["l2"]["kernel"] - y
    return 0.5 * jnp.mean(jnp.sum(errors**2, axis=1))


def run(**options):
    method = options.get("method", "woodfisherblock")
    options = {"sparsity": 0.6} | applicable(method, {"damping": DAMPING}) | options
    options["method"] = method
    samples = options.pop("samples", (X, Y))
    return prune(loss_fn, jax.tree.map(jnp.asarray, PARAMS), samples, **options)


def flat(tensors) -> np.ndarray:
    """Kernels one after another, (out, in) and row-major."""
    return np.concatenate([np.asarray(t).T.reshape(-1) for t in tensors.values()])


def weights_of(params) -> np.ndarray:
    return flat(leaves_by_path(params))


# ------------------------------------------------------------------------- the oracle

ACTIVE = flat(MASKS)
DENSE = np.ones(32, bool)


def backpropagation(active=DENSE, x=X, y=Y):
    """Inputs and output gradients of both layers, and all gradients [n, 32]."""
    w = (weights_of(PARAMS) * active).astype(np.float64)
    w1, w2 = w[:20].reshape(4, 5), w[20:].reshape(3, 4)
    x, y = np.float64(x), np.float64(y)
    hidden = np.tanh(x @ w1.T)
    d2 = hidden @ w2.T - y
    d1 = (d2 @ w2) * (1 - hidden**2)
    layers = [(x, d1), (hidden, d2)]
    rows = [np.einsum("no,ni->noi", d, a).reshape(len(x), -1) for a, d in layers]
    return layers, np.concatenate(rows, axis=1) * active


def block_diagonal(*blocks) -> np.ndarray:
    total = np.zeros((32, 32))
    at = 0
    for block in blocks:
        stop = at + len(block)
        total[at:stop, at:stop] = block
        at = stop
    return total


def kronecker(active=DENSE, damping=DAMPING, pi=False) -> np.ndarray:
    """The damped Fisher that kfac takes, [32, 32]."""
    blocks = []
    for inputs, outputs in backpropagation(active)[0]:
        a, s = inputs.T @ inputs / len(X), outputs.T @ outputs / len(X)
        ratio = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s))) if pi else 1.0
        a += ratio * np.sqrt(damping) * np.eye(len(a))
        s += np.sqrt(damping) / ratio * np.eye(len(s))
        blocks.append(np.kron(s, a))
    return block_diagonal(*blocks)


def fisher(active=DENSE, damping=DAMPING, centered=False) -> np.ndarray:
    """The damped Fisher of whole layers, [32, 32]."""
    rows = backpropagation(active)[1]
    mean = rows.mean(0)
    blocks = []
    for part in (slice(0, 20), slice(20, 32)):
        block = rows[:, part].T @ rows[:, part] / len(rows)
        blocks.append(block - centered * np.outer(mean[part], mean[part]))
    return block_diagonal(*blocks) + damping * np.eye(32)


@functools.cache
def hessian() -> np.ndarray:
    """All of the Hessian at the masked weights."""

    def loss(flat_weights):
        w1, w2 = flat_weights[:20].reshape(4, 5), flat_weights[20:].reshape(3, 4)
        params = {"l1": {"kernel": w1.T}, "l2": {"kernel": w2.T}}
        return loss_fn(params, (np.float64(X), np.float64(Y)))

    with jax.enable_x64(True):
        weights = np.float64(weights_of(PARAMS) * ACTIVE)
        return np.asarray(jax.jit(jax.hessian(loss))(weights))


def chosen(scores, active, sparsity, scope="global") -> np.ndarray:
    bounds = [(0, 32)] if scope == "global" else [(0, 20), (20, 32)]
    mask = np.zeros(32, bool)
    for start, stop in bounds:
        kept = int(np.floor(round((stop - start) * (1 - sparsity), 9)))
        inside = np.flatnonzero(active[start:stop]) + start
        ranked = inside[np.argsort(-scores[inside], kind="stable")]
        mask[ranked[:kept]] = True
    return mask


def obs(f, active=DENSE, sparsity=0.6, scope="global", mean=None):
    """Mask and weights of OBS with curvature F and slope ḡ; and the step itself."""
    w = (weights_of(PARAMS) * active).astype(np.float64)
    inverse = np.linalg.inv(f)
    newton = np.zeros(32) if mean is None else inverse @ mean
    diagonal = np.diag(inverse)
    scores = (w - newton) ** 2 / (2 * diagonal)
    mask = chosen(scores, active, sparsity, scope)
    newly = active & ~mask
    step = inverse @ np.where(newly, -(w - newton) / diagonal, 0) - newton
    gamma = 0.0 if mean is None else mean @ newton
    return mask, (w + step) * mask, step, scores[newly].sum() - gamma / 2


def assert_step(found, mask, weights, rtol=1e-4) -> None:
    params, masks, info = found
    np.testing.assert_array_equal(flat(masks), mask)
    np.testing.assert_allclose(weights_of(params), weights, rtol=rtol, atol=1e-5)
    assert info.nonzero == mask.sum()


def assert_same(one, other, rtol=1e-5) -> None:
    np.testing.assert_array_equal(flat(one[1]), flat(other[1]))
    np.testing.assert_allclose(
        weights_of(one[0]), weights_of(other[0]), rtol=rtol, atol=1e-6
    )


STARTS = pytest.mark.parametrize(
    ("masks", "active"),
    [
        pytest.param(None, DENSE, id="dense", marks=pytest.mark.slow),
        pytest.param(MASKS, ACTIVE, id="pruned"),
    ],
)
"""What holds of pruned weights holds of dense ones, which are the simpler case."""

# ------------------------------------------------------------------------ second order


@STARTS
@pytest.mark.parametrize(
    ("pi", "scope"),
    [pytest.param(False, "global", marks=pytest.mark.slow), (True, "layer")],
)
def test_kfac(masks, active, pi, scope) -> None:
    found = run(method="kfac", masks=masks, pi=pi, scope=scope)
    expected = obs(kronecker(active, pi=pi), active, scope=scope)
    assert_step(found, *expected[:2])
    assert found[2].num_samples == 24
    assert found[2].needs.num_weights == 32
    assert found[2].saliency_sum == pytest.approx(expected[3], rel=1e-4)


def test_kfac_takes_the_examples_of_a_batch_one_by_one() -> None:
    assert_same(run(method="kfac", batch_size=4), run(method="kfac"))


@pytest.mark.parametrize(
    "scope", [pytest.param("global", marks=pytest.mark.slow), "layer"]
)
def test_naivehess(scope) -> None:
    found = run(method="naivehess", masks=MASKS, scope=scope)
    w = weights_of(PARAMS) * ACTIVE
    diagonal = np.diag(hessian()) * ACTIVE
    assert (diagonal < 0).any()
    mask = chosen(0.5 * diagonal * w**2, ACTIVE, 0.6, scope)
    assert_step(found, mask, w * mask)


def test_naivehess_by_hutchinson() -> None:
    """On a sum over weights of their own curvature, signs are exact."""
    curvatures = RANDOM.random((6, 5)).astype(np.float32)
    params = {"w": jnp.asarray(RANDOM.standard_normal((6, 5)), jnp.float32)}
    own = lambda p, x: jnp.mean(x) * jnp.sum(curvatures * p["w"] ** 2)  # noqa: E731
    found = [
        prune(own, params, np.ones(3), sparsity=0.5, method="naivehess", hessian=name)
        for name in ("exact", "hutchinson")
    ]
    scores = (curvatures * params["w"] ** 2).reshape(-1)
    mask = np.zeros(30, bool)
    mask[np.argsort(scores)[15:]] = True
    for params, masks, _ in found:
        np.testing.assert_array_equal(masks["w"].reshape(-1), mask)
        assert np.count_nonzero(params["w"]) == 15


@pytest.mark.slow
def test_naivehess_estimates_from_as_many_probes_as_given() -> None:
    estimate = functools.partial(run, method="naivehess", hessian="hutchinson")
    many = estimate(num_probes=4000)
    assert_same(many, run(method="naivehess"))
    one, again, other = (
        estimate(num_probes=1, probe_seed=seed)[2].saliency_sum for seed in (0, 0, 1)
    )
    assert one == again != other


@pytest.mark.slow
@STARTS
def test_dynamic_with_whole_layers_is_block(masks, active) -> None:
    block = run(method="woodfisherblock", masks=masks)
    assert_same(run(method="woodfisherblockdynamic", masks=masks), block)
    assert_step(block, *obs(fisher(active), active)[:2])


# ------------------------------------------------------------------------- first order


@pytest.mark.parametrize(
    "scope", ["global", pytest.param("layer", marks=pytest.mark.slow)]
)
def test_woodtaylorblock(scope) -> None:
    masks, active = MASKS, ACTIVE
    found = run(method="woodtaylorblock", masks=masks, scope=scope)
    mean = backpropagation(active)[1].mean(0)
    mask, weights, _, saliency = obs(fisher(active), active, scope=scope, mean=mean)
    assert_step(found, mask, weights)
    assert found[2].saliency_sum == pytest.approx(saliency, rel=1e-3)


@pytest.mark.parametrize(
    "taylor", [pytest.param("woodtaylor", marks=pytest.mark.slow), "woodtaylorblock"]
)
def test_without_a_slope_woodtaylor_is_woodfisher(taylor) -> None:
    """Every example and one that pulls the other way."""
    given = RANDOM.standard_normal((20, 6, 5)).astype(np.float32)
    samples = np.concatenate([given, -given])
    params = {"w": jnp.asarray(RANDOM.standard_normal((6, 5)), jnp.float32)}
    inner = lambda p, x: jnp.mean(jnp.sum(p["w"] * x, (1, 2)))  # noqa: E731
    one, other = (
        prune(inner, params, samples, sparsity=0.5, damping=0.1, method=name)
        for name in (taylor, taylor.replace("taylor", "fisher"))
    )
    np.testing.assert_array_equal(one[1]["w"], other[1]["w"])
    np.testing.assert_allclose(one[0]["w"], other[0]["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: iter([(x[:5], y[:5]), (x[5:], y[5:])]),
        pytest.param(lambda x, y: (x, y), marks=pytest.mark.slow),
        pytest.param(lambda x, y: lambda i: (x, y), marks=pytest.mark.slow),
    ],
    ids=["iterator", "arrays", "function"],
)
def test_the_slope_may_have_samples_of_its_own(form) -> None:
    x = RANDOM.standard_normal((14, 5)).astype(np.float32)
    y = RANDOM.standard_normal((14, 3)).astype(np.float32)
    mean = backpropagation(x=x, y=y)[1].mean(0)
    expected = obs(fisher(), mean=mean)[:2]
    found = run(method="woodtaylorblock", mean_samples=form(x, y), microbatch_size=8)
    assert_step(found, *expected)
    with pytest.raises(ValueError, match="mean_samples: samples hold 0 examples"):
        run(method="woodtaylorblock", mean_samples=[])


@pytest.mark.parametrize(
    "method",
    ["woodfisherblock", pytest.param("woodtaylorblock", marks=pytest.mark.slow)],
)
def test_centered(method) -> None:
    found = run(method=method, centered=True, masks=MASKS)
    taylor = method == "woodtaylorblock"
    mean = backpropagation(ACTIVE)[1].mean(0) if taylor else None
    f = fisher(ACTIVE, centered=True)
    assert_step(found, *obs(f, ACTIVE, mean=mean)[:2])


def joint(f, mask, active=DENSE, mean=None) -> np.ndarray:
    """The weights at the minimum of the quadratic model on the mask."""
    w = (weights_of(PARAMS) * active).astype(np.float64)
    slope = np.zeros(32) if mean is None else mean
    newly, stays = np.flatnonzero(active & ~mask), np.flatnonzero(mask)
    right = f[np.ix_(stays, newly)] @ w[newly] - slope[stays]
    w[stays] += np.linalg.solve(f[np.ix_(stays, stays)], right)
    return w * mask


@STARTS
@pytest.mark.parametrize("method", ["woodfisherblock", "woodtaylorblock"])
def test_the_joint_update(masks, active, method) -> None:
    taylor = method == "woodtaylorblock"
    mean = backpropagation(active)[1].mean(0) if taylor else None
    found = run(method=method, update="joint", masks=masks, diagnostics=True)
    mask = obs(fisher(active), active, mean=mean)[0]
    expected = joint(fisher(active), mask, active, mean)
    assert_step(found, mask, expected)
    summed = run(method=method, masks=masks, diagnostics=True)
    # Without a slope the model is its quadratic term alone.
    one, other = (
        info.predicted_loss_increase - (0 if taylor else info.gradient_term)
        for _, _, info in (found, summed)
    )
    assert one <= other


@pytest.mark.slow
def test_the_joint_update_of_one_weight_is_the_sum() -> None:
    one, other = (run(update=u, sparsity=1 / 32) for u in ("joint", "sum"))
    assert_same(one, other, rtol=1e-4)


@pytest.mark.parametrize(
    ("scope", "reached"),
    [("global", ACTIVE.mean()), ("layer", max(m.mean() for m in MASKS.values()))],
)
def test_a_step_that_only_repairs(scope, reached) -> None:
    given = {"method": "woodtaylorblock", "update": "joint", "masks": MASKS}
    given |= {"sparsity": 1 - reached, "scope": scope}
    found = run(**given)
    mean = backpropagation(ACTIVE)[1].mean(0)
    assert_step(found, ACTIVE, joint(fisher(ACTIVE), ACTIVE, ACTIVE, mean))
    assert found[2].saliency_sum is None
    assert found[2].saliency_histogram is None
    ranked = run(**given, diagnostics=True)
    assert_same(found, ranked)
    assert ranked[2].saliency_sum is not None


@pytest.mark.slow
def test_a_repair_chooses_one_damping() -> None:
    given = {"method": "woodtaylor", "update": "joint", "masks": MASKS}
    given |= {"sparsity": 1 - ACTIVE.mean(), "damping": "auto"}
    found, ranked = run(**given), run(**given, diagnostics=True)
    assert_same(found, ranked)
    assert found[2].dampings == ranked[2].dampings
    assert len(found[2].dampings) == 2


@pytest.mark.slow
def test_in_layers_all_must_be_reached_for_a_repair() -> None:
    reached = 1 - MASKS["l1/kernel"].mean()
    assert reached > 1 - MASKS["l2/kernel"].mean()
    given = {"method": "woodtaylorblock", "update": "joint", "masks": MASKS}
    found = run(**given, sparsity=reached, scope="layer")[2]
    assert found.saliency_sum is not None
    assert found.sparsity_by_path["l2/kernel"] > 1 - MASKS["l2/kernel"].mean()


@pytest.mark.slow
def test_no_update() -> None:
    assert_same(run(update="none"), run(scale_update=0))


@pytest.mark.parametrize("most", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_update_is_shortened(most) -> None:
    found = run(method="woodtaylorblock", normalize_update=most)
    mean = backpropagation()[1].mean(0)
    mask, _, step, _ = obs(fisher(), mean=mean)
    w = weights_of(PARAMS)
    shortened = 0
    for part in (slice(0, 20), slice(20, 32)):
        ratio = np.linalg.norm(step[part]) / (most * np.linalg.norm(w[part]))
        step[part] /= max(1, ratio)
        shortened += ratio > 1
    assert shortened or most == 1
    assert_step(found, mask, (w + step) * mask)


# ----------------------------------------------------------------------------- options


@pytest.mark.parametrize("method", ["woodfisherblock", "kfac"])
def test_weight_decay_is_damping(method) -> None:
    one = run(method=method, damping=0.03, weight_decay=0.02)
    assert_same(one, run(method=method, damping=0.05), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "schedule", "fractions"),
    [
        pytest.param(
            *("woodtaylorblock", "linear", [1 / 3, 2 / 3]), marks=pytest.mark.slow
        ),
        ("kfac", "poly", [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3]),
    ],
)
def test_recomputation_is_several_steps(method, schedule, fractions) -> None:
    parts = [(X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]) for i in range(3)]
    drawn = []

    def samples(index):
        drawn.append(index)
        return parts[index]

    found = run(
        method=method,
        samples=samples,
        recompute=2,
        recompute_schedule=schedule,
        masks=MASKS,
        sparsity=0.7,
        diagnostics=True,
    )
    assert drawn == [0, 1, 2]
    before = 1 - ACTIVE.mean()
    params, masks, infos = jax.tree.map(jnp.asarray, PARAMS), MASKS, []
    for part, fraction in zip(parts, [*fractions, 1.0], strict=True):
        params, masks, info = prune(
            loss_fn,
            params,
            part,
            sparsity=before + fraction * (0.7 - before),
            method=method,
            masks=masks,
            damping=DAMPING,
            diagnostics=True,
        )
        infos.append(info)
    assert_same(found, (params, masks), rtol=0)
    info = found[2]
    assert info.sparsity == infos[-1].sparsity
    assert info.predicted_loss_increase == pytest.approx(
        sum(i.predicted_loss_increase for i in infos)
    )
    assert info.magnitude_overlap == infos[-1].magnitude_overlap


def test_recomputation_with_the_same_samples() -> None:
    with pytest.raises(ValueError, match=r"sparsity=0.1 is below"):
        run(recompute=2, masks=MASKS, sparsity=0.1)
    once = run(recompute=1)
    half = run(sparsity=0.3)
    again = prune(
        loss_fn,
        half[0],
        (X, Y),
        sparsity=0.6,
        method="woodfisherblock",
        damping=DAMPING,
        masks=half[1],
    )
    assert_same(once, again, rtol=0)


# ------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize(
    "method", ["woodtaylorblock", "kfac", "diagfisher", "naivehess"]
)
def test_the_predicted_loss_increase(method) -> None:
    params, masks, info = run(method=method, masks=MASKS, diagnostics=True)
    step = weights_of(params).astype(np.float64) - weights_of(PARAMS) * ACTIVE
    rows = backpropagation(ACTIVE)[1]
    curvature = {
        "woodtaylorblock": fisher(ACTIVE),
        "kfac": kronecker(ACTIVE),
        "diagfisher": np.diag((rows**2).mean(0)),
        "naivehess": np.diag(np.diag(hessian()) * ACTIVE),
    }[method]
    linear = rows.mean(0) @ step
    assert info.gradient_term == pytest.approx(linear, rel=1e-3)
    expected = linear + step @ curvature @ step / 2
    assert info.predicted_loss_increase == pytest.approx(expected, rel=1e-3)
    for path, part in zip(masks, (slice(0, 20), slice(20, 32)), strict=True):
        trace = (rows[:, part] ** 2).sum() / 24
        assert info.fisher_trace[path] == pytest.approx(trace, rel=1e-4)
    if not METHODS[method].moves:
        newly = flat(MASKS) & ~flat(masks)
        w = weights_of(PARAMS)[newly]
        assert info.saliency_sum == pytest.approx(
            (0.5 * np.diag(curvature)[newly] * w**2).sum(), rel=1e-3
        )


@pytest.mark.slow
def test_a_quadratic_loss_is_predicted_exactly() -> None:
    """With the Fisher of unit residuals, F is the Hessian, and so is the prediction."""
    x = RANDOM.standard_normal((400, 6)).astype(np.float32)
    signs = np.sign(RANDOM.standard_normal((400, 1))).astype(np.float32)
    truth = RANDOM.standard_normal((6, 1)).astype(np.float32)
    batch = (x, x @ truth + signs)
    loss = lambda p, b: 0.5 * jnp.mean((b[0] @ p["w"] - b[1]) ** 2)  # noqa: E731
    params = {"w": jnp.asarray(truth)}
    new, _, info = prune(
        loss,
        params,
        batch,
        sparsity=0.5,
        method="woodtaylor",
        damping=1e-6,
        diagnostics=True,
    )
    measured = float(loss(new, batch) - loss(params, batch))
    assert info.predicted_loss_increase == pytest.approx(measured, rel=1e-3)
    assert info.measured_loss_increase == pytest.approx(measured, rel=1e-4)


def test_magnitude_agrees_with_itself() -> None:
    info = run(method="globalmagni", diagnostics=True)[2]
    assert info.magnitude_overlap == 1
    assert info.magnitude_correlation == pytest.approx(1)
    assert info.predicted_loss_increase is None
    assert info.saliency_sum is None


def test_diagnostics_change_nothing_and_cost_nothing_by_default() -> None:
    plain, looked_at = run(), run(diagnostics=True)
    assert_same(looked_at, plain)
    assert plain[2].saliency_sum == pytest.approx(looked_at[2].saliency_sum, rel=1e-5)
    for field in (
        "predicted_loss_increase",
        "measured_loss_increase",
        "magnitude_overlap",
        "fisher_trace",
    ):
        assert getattr(plain[2], field) is None
        assert getattr(looked_at[2], field) is not None


# -------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("method", ["kfac", "naivehess"])
def test_the_plan_is_that_of_the_step(monkeypatch, method) -> None:
    monkeypatch.setattr(budget, "resident", lambda: 10**9)
    options = {"sparsity": 0.6, "method": method, "memory_limit": 10**12}
    found = plan_pruning(loss_fn, PARAMS, (X, Y), **options)
    assert found == run(**options)[2].needs


@pytest.mark.parametrize("method", ["woodtaylor", "woodfisherblockdynamic"])
def test_a_plan_takes_the_same_options(method) -> None:
    needs = plan_pruning(
        loss_fn, PARAMS, lambda i: (X, Y), sparsity=0.5, method=method, recompute=2
    )
    assert needs.num_weights == 32
    assert needs.num_samples == 24
