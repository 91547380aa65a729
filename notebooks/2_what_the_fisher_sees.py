# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What the Fisher sees
#
# WoodFisher prunes by means of a matrix that is usually too large to store. The network
# of this notebook has 888 weights, so the matrix, its inverse and the predictions from
# them can be computed in NumPy, plotted, and compared with the measured loss.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import woodfisher_jax as wf

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"

# %% [markdown]
# ## A network at its minimum
#
# Predictions from curvature assume that the gradient is zero. So this network is
# trained, by L-BFGS on all images at once, to a minimum of cross entropy plus weight
# decay,
#
# $$L(w) = \frac{1}{N} \sum_n \ell_n(w) + \frac{\alpha}{2} \lVert w \rVert^2 .$$

# %%
x, y = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    (x / 16).astype("float32"), y, test_size=360, random_state=0, stratify=y
)
samples = jnp.asarray(train_x), jnp.asarray(train_y)
N = len(train_x)
DECAY = 3e-3  # α


def logits_of(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def cross_entropy(params, batch):
    x, y = batch
    logits = logits_of(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss_fn(params, decay=DECAY):
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return cross_entropy(params, samples) + decay / 2 * squares


@partial(jax.jit, static_argnames=("decay", "steps"))
def fit(params, decay, steps):
    tx = optax.lbfgs()
    loss = partial(loss_fn, decay=decay)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


one, other = jax.random.split(jax.random.key(0))
start = {
    "hidden": jax.random.normal(one, (64, 12)) / 8,
    "out": jax.random.normal(other, (12, 10)) / np.sqrt(12),
}
params = fit(start, decay=DECAY, steps=250)
top1 = 100 * np.mean(logits_of(params, test_x).argmax(-1) == test_y)
slope = optax.tree.norm(jax.grad(loss_fn)(params))
print(f"loss {loss_fn(params):.4f}, gradient norm {slope:.4f}, top-1 {top1:.2f} %")
assert top1 > 93
assert slope < 0.02

# %% [markdown]
# ## The matrix
#
# Each training example $n$ has one gradient $g_n$, a row of $G$. The Fisher is the
# second moment of the gradients plus a damping $\lambda$ on the diagonal. The damping
# is the weight decay, which is what decay adds to the curvature of the loss.
#
# $$F = \lambda I + \frac{1}{N} \sum_{n=1}^N g_n g_n^\top = \lambda I + \frac{1}{N}
# G^\top G, \qquad \lambda = \alpha$$

# %%
w, unravel = ravel_pytree(params)
w = np.float64(w)


@jax.jit
def gradients_of(params, labels):
    def one(x, y):
        gradient = jax.grad(cross_entropy)(params, (x[None], y[None]))
        return ravel_pytree(gradient)[0]

    return jax.vmap(one)(samples[0], labels)


def fisher_of(gradients, damping=DECAY):
    return damping * np.eye(w.size) + gradients.T @ gradients / len(gradients)


G = np.float64(gradients_of(params, samples[1]))  # [N, 888]
F = fisher_of(G)

# The 120 weights of the last layer, sorted by class.
by_class = 768 + np.arange(120).reshape(12, 10).T.ravel()
block = (F - DECAY * np.eye(w.size))[np.ix_(by_class, by_class)]
scale = np.sqrt(np.diag(block))
correlation = block / np.outer(scale, scale)
eigenvalues = np.linalg.eigvalsh(F)[::-1]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
picture = left.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1)
ticks = np.arange(6, 120, 12)
left.set(title="Last layer: correlation of gradients", xlabel="class", ylabel="class")
left.set_xticks(ticks, range(10))
left.set_yticks(ticks, range(10))
figure.colorbar(picture, ax=left, shrink=0.85)
right.semilogy(np.arange(1, 889), eigenvalues, color=BLUE, label="eigenvalues of F")
right.axhline(DECAY, color=ORANGE, linestyle="--", label="damping λ")
right.set(title="F of all 888 weights", xlabel="direction, steepest first")
right.grid(alpha=0.3)
right.legend()
plt.show()

# %% [markdown]
# Left: gradients of weights to the same class (squares on the diagonal) are more
# correlated than those of weights to different classes. A method that uses only the
# diagonal of $F$ neglects all correlations; one that uses blocks includes those within
# a block.
#
# Right: the loss is steep in few directions and flat in most. Fewer than one direction
# in twenty has ten times the curvature of the damping, and in nine of ten the data add
# less to the curvature than the damping does. That is why so many weights can be
# removed: others can compensate for most of their effect.

# %%
same = np.kron(np.eye(10), np.ones((12, 12))).astype(bool) & ~np.eye(120, dtype=bool)
others = np.kron(1 - np.eye(10), np.ones((12, 12))).astype(bool)
within, between = abs(correlation[same]).mean(), abs(correlation[others]).mean()
steep = np.mean(eigenvalues > 10 * DECAY)
flat = np.mean(eigenvalues < 2 * DECAY)
print(f"|correlation| within a class {within:.2f}, between classes {between:.2f}")
print(f"{steep:.1%} of the directions are steep, {flat:.1%} nearly flat")
assert within > 1.5 * between
assert steep < 0.05
assert flat > 0.9

# %% [markdown]
# ## The inverse
#
# Both the saliency and the update need $F^{-1}$. The paper computes it one gradient at
# a time, by the Woodbury identity, starting from $F_0^{-1} = I / \lambda$:
#
# $$F_n^{-1} = F_{n-1}^{-1} - \frac{v v^\top}{N + g_n^\top v}, \qquad v = F_{n-1}^{-1}
# g_n$$
#
# In NumPy that is a loop of two lines. But it stores a matrix of (number of weights)²,
# while a pruning step needs only its diagonal and one product. With fewer samples than
# weights, the library therefore computes in the space of the samples, with $N \times N$
# numbers and the same result:
#
# $$F^{-1} = \frac{1}{\lambda} \left(I - G^\top (N \lambda I + G G^\top)^{-1} G\right)$$

# %%
inverse = np.linalg.inv(F)

# By the recursion of the paper, on the first 100 gradients.
few = G[:100]
recursion = np.eye(w.size) / DECAY
for g in few:
    v = recursion @ g
    recursion -= np.outer(v, v) / (len(few) + g @ v)

# By the library, in float32, without a matrix of 888 x 888.
solver = wf.fisher.SOLVERS["sample_space"]
few32 = jnp.float32(few)
factor = solver.factorize(few32, DECAY)
diagonal = solver.diagonal(factor, few32, DECAY)
print(
    "the library's factor:", factor.shape, "- the recursion's matrix:", recursion.shape
)

directly = np.linalg.inv(fisher_of(few))
np.testing.assert_allclose(recursion, directly, rtol=1e-8, atol=1e-8)
np.testing.assert_allclose(diagonal, np.diag(directly), rtol=1e-3)

# %% [markdown]
# What does the diagonal of the inverse mean? $1 / [F^{-1}]_{qq}$ is the curvature in
# weight $q$ *after all others have adjusted*. Its average over the twelve weights of a
# pixel shows which pixels vary between digits. Pixels that are constant in all training
# images have no gradient, and their curvature equals the damping.

# %%
stiffness = 1 / np.diag(inverse)
by_pixel = stiffness[:768].reshape(64, 12).mean(1)
ink = train_x.std(0)

figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
pictures = {
    "curvature of a pixel's weights": by_pixel,
    "standard deviation of the pixel": ink,
}
for axis, (title, values) in zip(axes, pictures.items(), strict=True):
    shown = axis.imshow(values.reshape(8, 8), cmap="cividis")
    axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(shown, ax=axis, shrink=0.85)
plt.show()

black = ink == 0
print(f"correlation of the two images: {np.corrcoef(by_pixel, ink)[0, 1]:.2f}")
assert black.any()
np.testing.assert_allclose(by_pixel[black], DECAY, rtol=1e-6)
assert np.corrcoef(by_pixel, ink)[0, 1] > 0.7

# %% [markdown]
# ## Which weights are pruned
#
# The threshold of magnitude pruning is a vertical line: weights to its left are pruned.
# WoodFisher combines size and stiffness, $\rho_q = w_q^2 / (2 [F^{-1}]_{qq})$; its
# threshold is a sloping line. The two methods differ in the weights between the lines:
# large ones with a low stiffness, and small ones with a high stiffness.
#
# How many these are depends on the damping, which is the smallest stiffness that a
# weight can have. Where the damping dominates, $\rho_q \to \lambda w_q^2 / 2$:
# WoodFisher with a large damping *is* magnitude pruning. The left plot has the damping
# of this network's weight decay, the right one the library's default of $10^{-5}$.

# %%
by_damping = {
    DECAY: stiffness,
    1e-5: 1 / np.diag(np.linalg.inv(fisher_of(G, 1e-5))),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
disagree = {}
for axis, (damping, stiff) in zip(axes, by_damping.items(), strict=True):
    by_size, by_fisher = np.zeros((2, w.size), bool)
    by_size[np.argsort(abs(w))[: w.size // 2]] = True
    by_fisher[np.argsort(w**2 * stiff)[: w.size // 2]] = True
    disagree[damping] = np.sum(by_fisher & ~by_size) / np.sum(by_fisher)
    kinds = {
        "both prune": (by_fisher & by_size, GREY, "."),
        "both keep": (~by_fisher & ~by_size, BLUE, "."),
        "only WoodFisher prunes": (by_fisher & ~by_size, ORANGE, "o"),
        "only magnitude prunes": (~by_fisher & by_size, GREEN, "^"),
    }
    for label, (chosen, colour, marker) in kinds.items():
        axis.loglog(
            abs(w[chosen]),
            stiff[chosen],
            marker,
            color=colour,
            markersize=5,
            label=f"{label} ({chosen.sum()})",
        )
    axis.set(xlabel="|w|", xlim=(1e-3, 10), title=f"Half pruned, λ = {damping:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left")
axes[0].set_ylabel(r"stiffness $1 / [F^{-1}]_{qq}$")
plt.show()
for damping, share in disagree.items():
    print(f"λ = {damping:g}: magnitude keeps {share:.1%} of what WoodFisher prunes")

# %% [markdown]
# The two agree on nearly all weights: in this network magnitude ranks the weights well,
# and the better the larger the damping. They differ in the update: magnitude pruning
# does not change the other weights, WoodFisher does, and the measurements below show
# that the update makes the difference.
#
# The library returns the same mask, with all weights in one block and the same damping:

# %%
assert disagree[DECAY] < disagree[1e-5] < 0.1

_, masks, info = wf.prune(
    cross_entropy,
    params,
    samples,
    sparsity=0.5,
    method="woodfisher",
    damping=DECAY,
    diagnostics=True,
)
saliency = w**2 * stiffness / 2
order = np.argsort(saliency)
pruned = np.concatenate([~np.asarray(masks[path]).ravel() for path in masks])
both = pruned[order[:444]].sum()
print(f"{pruned.sum()} are pruned; {both} of them by NumPy's saliencies as well")
assert pruned.sum() == 444
assert pruned[order[:444]].sum() >= 443

# %% [markdown]
# ## Predicted against measured: one weight
#
# The saliency predicts how much the loss rises if weight $q$ is removed and the others
# compensate. To test it, set one weight to zero, move the others by $\delta w$, and
# measure the loss; repeat that for 200 weights.
#
# The prediction depends on $F$. The *empirical* Fisher uses the labels of the data.
# Near a good fit their gradients are small, and their second moment is below the
# curvature that it estimates. Labels drawn from the network's own predictions
# (`wf.gradients.sample_labels`) give the *true* Fisher, an unbiased estimate of the
# Gauss-Newton curvature; ten draws for each example make it less noisy. The test
# includes both.

# %%
draws = [
    gradients_of(
        params,
        wf.gradients.sample_labels(jax.random.key(i), logits_of(params, train_x)),
    )
    for i in range(10)
]
true_fisher = fisher_of(np.float64(np.concatenate(draws)))


@jax.jit
def losses_at(weights):
    return jax.lax.map(lambda v: loss_fn(unravel(v)), weights, batch_size=32)


def increases(deltas):
    """Increase of the loss at w + δ, for the rows δ of a matrix."""
    start = losses_at(jnp.float32(w[None]))[0]
    return np.float64(losses_at(jnp.float32(w + np.atleast_2d(deltas))) - start)


tried = np.argsort(saliency)[-400::2]  # smaller increases are lost in float32
single = {}
for name, matrix in {"empirical": F, "true": true_fisher}.items():
    inv = np.linalg.inv(matrix)
    predicted = w[tried] ** 2 / (2 * np.diag(inv)[tried])
    deltas = -(w[tried] / np.diag(inv)[tried])[:, None] * inv[tried]
    single[name] = predicted, increases(deltas)

figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
looks = {"empirical": ("o", BLUE), "true": ("^", ORANGE)}
for name, (predicted, measured) in single.items():
    marker, colour = looks[name]
    axis.loglog(
        predicted,
        measured,
        marker,
        color=colour,
        markersize=4,
        label=f"{name} Fisher",
    )
limits = np.array([saliency[tried].min() / 2, single["true"][1].max() * 2])
axis.loglog(limits, limits, color="black", linewidth=0.8, label="measured = predicted")
axis.set(xlabel="predicted increase of the loss", ylabel="measured")
axis.set_title("One weight removed, the others adjusted", size="medium")
axis.grid(alpha=0.3)
axis.legend()
plt.show()


def ranks(values):
    return np.argsort(np.argsort(values))


for name, (predicted, measured) in single.items():
    agreement = np.corrcoef(ranks(predicted), ranks(measured))[0, 1]
    factor = np.median(measured / predicted)
    print(
        f"{name:10} rank correlation {agreement:.3f}, measured / predicted {factor:.2f}"
    )
    assert agreement > 0.95
    single[name] = (*single[name], factor)
assert 1 < single["true"][2] < single["empirical"][2] < 3

# %% [markdown]
# The points lie along a line, over more than a decade: the Fisher *ranks* the weights
# as the loss does, which is all that a mask needs. Its scale is off, by a factor of
# about two for the empirical Fisher and by less for the true one. (A constant factor on
# the whole matrix changes neither the mask nor the update.)

# %% [markdown]
# ## Predicted against measured: many weights
#
# Now a share $s$ of all weights is pruned at once. There are three predictions:
#
# - the sum of the saliencies, as if each weight were removed alone;
# - the quadratic model $\tfrac{1}{2} \delta w^\top F\, \delta w$ at WoodFisher's step,
#   the sum of the single updates (`info.predicted_loss_increase`);
# - the quadratic model at its minimum with all these weights at zero
#   (`update="joint"`).

# %%
shares = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
summed, sum_steps, joint_steps, bare_steps = [], [], [], []
for share in shares:
    pruned = np.zeros(w.size, bool)
    pruned[order[: int(share * w.size)]] = True
    summed.append(saliency[pruned].sum())
    bare_steps.append(np.where(pruned, -w, 0))
    step = inverse @ np.where(pruned, -w / np.diag(inverse), 0)
    sum_steps.append(np.where(pruned, -w, step))
    stay = np.linalg.solve(F[~pruned][:, ~pruned], F[~pruned][:, pruned] @ w[pruned])
    joint = -w.copy()
    joint[~pruned] = stay
    joint_steps.append(joint)


def quadratic_model(deltas):
    return np.einsum("ki,ij,kj->k", deltas, F, deltas, optimize=True) / 2


measured = {
    "no update": increases(np.array(bare_steps)),
    "sum of updates": increases(np.array(sum_steps)),
    "joint update": increases(np.array(joint_steps)),
}
predicted = {
    "sum of updates": quadratic_model(np.array(sum_steps)),
    "joint update": quadratic_model(np.array(joint_steps)),
}
figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
percent = 100 * shares
axis.semilogy(percent, summed, ":", color=GREY, label="predicted: sum of saliencies")
for name, colour in (("sum of updates", BLUE), ("joint update", ORANGE)):
    axis.semilogy(
        percent, predicted[name], "--", color=colour, label=f"predicted: {name}"
    )
for name, colour in (
    ("no update", "black"),
    ("sum of updates", BLUE),
    ("joint update", ORANGE),
):
    axis.semilogy(
        percent, measured[name], "o-", color=colour, label=f"measured: {name}"
    )
axis.set(xlabel="weights pruned, %", ylabel="increase of the loss", xticks=percent)
axis.grid(alpha=0.3)
axis.legend(fontsize="small")
plt.show()

for name, rise in predicted.items():
    print(name, "measured / predicted:", np.round(measured[name] / rise, 1))
assert (predicted["joint update"] <= predicted["sum of updates"] * 1.0001).all()
assert (measured["joint update"] < measured["sum of updates"])[2:].all()
assert (measured["sum of updates"] < measured["no update"])[:5].all()
assert (measured["joint update"] / predicted["joint update"])[2] < 4
assert (measured["joint update"] / predicted["joint update"])[-1] > 8

# %% [markdown]
# - Up to half of the weights, the quadratic model is off by the same factor as for one
#   weight, and the sum of the saliencies is as good. For larger shares the model no
#   longer holds, and at 90 % the loss rises more than eight times as much as predicted.
# - From half of the weights on, the joint update raises the loss less than the sum of
#   updates does, and both are better than no update as long as the model holds.
#
# Two conclusions: take small steps and estimate the Fisher again at each (`wf.gradual`,
# or `recompute=` in `wf.prune`), and check `info.predicted_loss_increase` before you
# rely on a large step.

# %%
# The gradient of the cross entropy alone is not zero at w: subtract its term.
curved = info.predicted_loss_increase - info.gradient_term
at_half = predicted["sum of updates"][2]
print(f"wf.prune predicts {curved:.5f}, NumPy {at_half:.5f}")
np.testing.assert_allclose(curved, at_half, rtol=0.05)
