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
# # WoodFisher in 5 minutes
#
# A trained network has many weights that can be removed. The usual choice is the
# smallest ones. This notebook trains a small network on handwritten digits, prunes it
# by magnitude and by second-order information, and plots the remaining accuracy. It
# needs no download and runs in a minute on a laptop.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import woodfisher_jax as wf

# %% [markdown]
# ## A dense network
#
# The data are 1,797 images of 8 x 8 pixels; 360 of them are held out for testing. The
# network is a perceptron 64-40-20-10. Its parameters are a plain dict of arrays, and
# its loss is a function of parameters and a batch. The library needs nothing else.

# %%
x, y = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    (x / 16).astype("float32"), y, test_size=360, random_state=0, stratify=y
)


def init(key):
    widths = (64, 40, 20, 10)
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(widths), start=1):
        key, own = jax.random.split(key)
        params[f"layer{i}"] = {
            "kernel": jax.random.normal(own, (n, m)) * jnp.sqrt(2 / n),
            "bias": jnp.zeros(m),
        }
    return params


def logits_of(params, x):
    for i in (1, 2):
        x = jax.nn.relu(x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"])
    return x @ params["layer3"]["kernel"] + params["layer3"]["bias"]


def loss_fn(params, batch):
    x, y = batch
    logits = logits_of(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def top1(params):
    return 100 * jnp.mean(logits_of(params, test_x).argmax(-1) == test_y)


# %% [markdown]
# Train it with AdamW for 600 steps of 64 images.

# %%
tx = optax.adamw(3e-3, weight_decay=1e-2)


@jax.jit
def train(key):
    start, order = jax.random.split(key)
    params = init(start)

    def step(carry, key):
        params, opt_state = carry
        rows = jax.random.randint(key, (64,), 0, len(train_x))
        batch = jnp.asarray(train_x)[rows], jnp.asarray(train_y)[rows]
        updates, opt_state = tx.update(
            jax.grad(loss_fn)(params, batch), opt_state, params
        )
        return (optax.apply_updates(params, updates), opt_state), None

    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, jax.random.split(order, 600))[0][0]


dense = train(jax.random.key(0))
kernels = sum(layer["kernel"].size for layer in dense.values())
print(f"dense: {top1(dense):.2f} % of the test images, {kernels:,} weights")
assert top1(dense) > 93

# %% [markdown]
# ## Pruned in one call
#
# `wf.prune_outputs` takes the network as a function, its parameters and some inputs. It
# needs no labels and trains nothing: in twelve steps it prunes the weights that the
# outputs need least, and moves the others so that the outputs stay.

# %%
params, masks, info = wf.prune_outputs(logits_of, dense, train_x, sparsity=0.8)
print(f"{info.nonzero} of {info.prunable} weights remain; top-1 {top1(params):.2f} %")
print({path: f"{level:.0%}" for path, level in info.sparsity_by_path.items()})

# Pruned weights are exactly zero, and their number is exactly that of the target.
left = {path: np.count_nonzero(params[path.split("/")[0]]["kernel"]) for path in masks}
assert left == {path: int(mask.sum()) for path, mask in masks.items()}
assert sum(left.values()) == info.nonzero == kernels // 5
assert top1(params) > top1(dense) - 2

# %% [markdown]
# The rest of this notebook shows what such a step is made of.
#
# ## Saliency
#
# Around the trained weights $w$ the loss is approximately quadratic, with the *Fisher*
# matrix $F$ as its curvature:
#
# $$L(w + \delta) \approx L(w) + \tfrac{1}{2}\, \delta^\top F\, \delta, \qquad
# F = \lambda I + \frac{1}{N} \sum_{n=1}^{N} g_n g_n^\top$$
#
# with $g_n$ the gradient of the loss on one training example and a small damping
# $\lambda$. Remove weight $q$ and move all others to the minimum of the quadratic
# model. The loss then rises by the *saliency* $\rho_q$, and the weights change by
# $\delta w$:
#
# $$\rho_q = \frac{w_q^2}{2\,[F^{-1}]_{qq}}, \qquad
# \delta w = -\frac{w_q}{[F^{-1}]_{qq}}\, F^{-1} e_q$$
#
# The weights with the lowest saliency are pruned. A small weight is kept if the loss is
# steep in it, and a large one is pruned if other weights can compensate.
#
# `wf.prune` takes one such step: gradients, curvature, saliencies, masks and update.
# A few hundred examples are enough for $F$; here they are 400 training images.

# %%
samples = train_x[:400], train_y[:400]
params, masks, info = wf.prune(
    loss_fn, dense, samples, sparsity=0.8, method="woodfisher"
)
print(f"{info.nonzero} of {info.prunable} weights remain; top-1 {top1(params):.2f} %")

# %% [markdown]
# ## Comparison with magnitude
#
# The same call with `method="globalmagni"` prunes the smallest weights of all layers
# together. WoodFisher's masks without its update (`update="none"`) separate the effect
# of the masks from that of the update. `update="joint"` moves the remaining weights to
# the minimum of the quadratic model with *all* pruned weights removed, whereas the sum
# of the single updates $\delta w$ treats each weight as if it were removed alone.
#
# The networks are not trained after pruning, because that would hide the difference.
# `wf.prune_outputs` takes twelve steps in place of one, from the same 400 images
# without labels, each the joint update with the gradients of outputs in place of those
# of the loss. Three networks from three random starts are each pruned from dense to
# each sparsity.

# %%
ways = {
    "global magnitude": {"method": "globalmagni"},
    "WoodFisher, masks alone": {"method": "woodfisher", "update": "none"},
    "WoodFisher": {"method": "woodfisher"},
    "WoodFisher, joint update": {"method": "woodfisher", "update": "joint"},
}
levels = (0.5, 0.6, 0.7, 0.8, 0.9)
networks = [train(jax.random.key(seed)) for seed in range(3)]


def pruned_top1(net, sparsity, **how):
    return top1(wf.prune(loss_fn, net, samples, sparsity=sparsity, **how)[0])


def matched_top1(net, sparsity):
    return top1(wf.prune_outputs(logits_of, net, samples[0], sparsity=sparsity)[0])


accuracy = {
    name: np.array([[pruned_top1(net, s, **how) for s in levels] for net in networks])
    for name, how in ways.items()
}
accuracy["prune_outputs, no labels"] = np.array(
    [[matched_top1(net, s) for s in levels] for net in networks]
)
print(" " * 26 + "".join(f"{s:>8.0%}" for s in levels))
for name, found in accuracy.items():
    print(f"{name:26}" + "".join(f"{mean:8.2f}" for mean in found.mean(0)))

# %%
styles = {
    "global magnitude": {"color": "#777777", "linestyle": "--", "marker": "s"},
    "WoodFisher, masks alone": {"color": "#56B4E9", "linestyle": ":", "marker": "v"},
    "WoodFisher": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "WoodFisher, joint update": {"color": "#D55E00", "linestyle": "-", "marker": "D"},
    "prune_outputs, no labels": {"color": "#009E73", "linestyle": "-", "marker": "^"},
}
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
percent = 100 * np.array(levels)
for name, found in accuracy.items():
    axes.plot(percent, found.mean(0), label=name, **styles[name])
    axes.fill_between(
        percent, found.min(0), found.max(0), color=styles[name]["color"], alpha=0.12
    )
dense_top1 = np.mean([top1(net) for net in networks])
axes.axhline(dense_top1, color="black", linewidth=0.8)
axes.text(90, dense_top1 + 1, "dense", ha="right")
axes.set(
    xlabel="weights pruned, %",
    ylabel="top-1, %",
    title="Digits, pruned and not retrained (mean and range of 3 networks)",
    xticks=percent,
)
axes.title.set_size("medium")
axes.grid(alpha=0.3)
axes.legend(loc="lower left")
plt.show()

# %% [markdown]
# Up to 80 % WoodFisher is more accurate than magnitude, and the joint update more
# accurate still. Most of the gain comes from the update: the masks alone are little
# better than those of magnitude.
#
# At 90 % in a single step all methods lose most of the accuracy, and the plain update
# is no better than no update: so far from the dense weights the quadratic model no
# longer describes the loss. In several steps it does, for each estimates the curvature
# again. `wf.prune_outputs` takes them without labels or training; where a network is
# trained further, pruning steps alternate with training. Three statements in a training
# loop do that: see *Prune your own model*.

# %%
mean = {name: found.mean(0) for name, found in accuracy.items()}
assert (mean["WoodFisher"] > mean["global magnitude"])[:4].all()
assert (mean["WoodFisher, joint update"] > mean["WoodFisher"]).all()
by_masks = mean["WoodFisher, masks alone"] - mean["global magnitude"]
by_update = mean["WoodFisher"] - mean["WoodFisher, masks alone"]
assert by_update[:4].mean() > by_masks[:4].mean()
matched = mean.pop("prune_outputs, no labels")
assert all(found[-1] < 60 for found in mean.values())
assert all((matched >= found - 0.5).all() for found in mean.values())
assert matched[-1] > max(found[-1] for found in mean.values()) + 10

# %% [markdown]
# ## Further reading
#
# - *What the Fisher sees* plots the curvature of a small network and its inverse, and
#   compares predicted with measured loss increases.
# - *Prune your own model*: any network, any loss, any training loop.
# - From the command line, `python -m woodfisher_jax.main --config=configs/digits.py`
#   trains a network, prunes it gradually and writes a report.
