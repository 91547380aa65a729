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
# # Prune your own model
#
# No layer has to be registered, subclassed or rewritten. You provide
#
# 1. parameters: any pytree of arrays,
# 2. a loss: a function of parameters and a batch that returns a scalar,
# 3. some examples.
#
# The model of this notebook is not one of the shipped ones: a denoiser in Flax NNX that
# removes noise from images of digits. Its loss is a squared error, and it has no
# classes. Replace the three cells below by your own model; the rest stays the same.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import woodfisher_jax as wf
from woodfisher_jax.weights import sparse_files

images = (load_digits().images.reshape(-1, 64) / 16).astype("float32")
train_x, test_x = train_test_split(images, test_size=360, random_state=0)


def noisy(x, seed):
    """Examples are pairs of a noisy image and the clean one."""
    noise = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    return x + 0.3 * noise, x


# %% [markdown]
# **1. Parameters.** An NNX module is an object; `nnx.split` extracts its arrays, and
# `nnx.merge` inserts them again. (Linen parameters and plain dicts are pytrees already;
# Equinox has `eqx.partition` and `eqx.combine`.)


# %%
class Denoiser(nnx.Module):
    def __init__(self, rngs):
        self.encode = nnx.Linear(64, 48, rngs=rngs)
        self.norm = nnx.LayerNorm(48, rngs=rngs)
        self.decode = nnx.Linear(48, 64, rngs=rngs)

    def __call__(self, x):
        return self.decode(nnx.relu(self.norm(self.encode(x))))


graph, start = nnx.split(Denoiser(nnx.Rngs(0)), nnx.Param)

# %% [markdown]
# **2. A loss.** It must be the mean over the examples of the batch: the library forms
# the Fisher from its gradients on single examples.


# %%
@jax.jit
def loss_fn(params, batch):
    noised, clean = batch
    return jnp.mean((nnx.merge(graph, params)(noised) - clean) ** 2)


test = noisy(test_x, seed=1)

# %% [markdown]
# **3. Examples** for the Fisher: a few hundred training examples, in one batch or an
# iterable of batches.

# %%
samples = noisy(train_x[:400], seed=2)

# %% [markdown]
# ## Which weights
#
# By default every array of two or more dimensions is prunable. `wf.init_masks` lists
# them by path, and takes a regular expression or a predicate to choose others. Biases
# and norms stay dense: they are few, and the loss is sensitive to them.

# %%
for path, mask in wf.init_masks(start).items():
    print(f"{path:24} {mask.shape}")
assert set(wf.init_masks(start)) == {"encode/kernel/value", "decode/kernel/value"}
assert set(wf.init_masks(start, prunable="decode/kernel")) == {"decode/kernel/value"}
by_size = wf.init_masks(start, prunable=lambda path, array: array.size == 64)
print("arrays of 64 numbers:", list(by_size))
assert list(by_size) == ["decode/bias/value"]

# %% [markdown]
# ## Memory
#
# For a large model, plan before you start: `wf.plan_pruning` computes nothing, and
# returns how much memory a step takes and where its gradients are stored (see *Large
# networks* in the documentation). It takes the arguments of `wf.prune`.

# %%
needs = wf.plan_pruning(loss_fn, start, samples, sparsity=0.8)
print(f"gradients on: {needs.store}; peak memory {needs.peak_bytes / 1e6:.0f} MB")

# %% [markdown]
# ## A training loop of your own
#
# An ordinary training loop with three additional statements:
#
# 1. `wf.masked` wraps the optimizer and keeps pruned weights, their gradients and their
#    momentum at zero;
# 2. `wf.gradual` lists when to prune and how far, with large steps first, $s(t) = s_f +
#    (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3$;
# 3. `wf.prune_masked` prunes between two training steps.


# %%
def train(seed, sparsity, steps=500):
    params = start
    tx = wf.masked(optax.adam(3e-3), wf.init_masks(params))  # 1
    opt_state = tx.init(params)
    levels = {}
    if sparsity:
        levels = dict(wf.gradual(200, 350, 50, initial=0.5, target=sparsity))  # 2

    @jax.jit
    def train_step(params, opt_state, batch):
        gradients = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(seed)
    history = []
    for step in range(steps):
        if step in levels:
            params, opt_state, info = wf.prune_masked(  # 3
                loss_fn,
                params,
                opt_state,
                samples,
                sparsity=levels[step],
                update="joint",
            )
            history.append((step, info.sparsity, float(loss_fn(params, test))))
        batch = noisy(train_x[rng.integers(0, len(train_x), 64)], rng.integers(2**32))
        params, opt_state = train_step(params, opt_state, batch)
        if step % 10 == 9:
            level = wf.sparsity(wf.masks_of(opt_state))
            history.append((step + 1, level, float(loss_fn(params, test))))
    return params, opt_state, np.array(history)


dense, _, dense_history = train(seed=0, sparsity=0.0)
pruned, opt_state, history = train(seed=0, sparsity=0.8)
masks = wf.masks_of(opt_state)
print(f"dense  {dense_history[-1, 2]:.4f}")
print(f"pruned {history[-1, 2]:.4f} with {wf.sparsity(masks):.0%} of the weights zero")

# %%
figure, (left, right) = plt.subplots(
    2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
)
left.plot(*dense_history[:, [0, 2]].T, color="#777777", linestyle="--", label="dense")
left.plot(*history[:, [0, 2]].T, color="#0072B2", label="pruned to 80 %")
left.set(ylabel="squared error on test images", ylim=(0.02, 0.08))
left.grid(alpha=0.3)
left.legend()
right.step(*history[:, [0, 1]].T, where="post", color="#0072B2")
right.set(xlabel="training step", ylabel="sparsity")
right.grid(alpha=0.3)
plt.show()

# Pruned weights are exactly zero after 150 further steps of Adam.
jax.tree.map(np.testing.assert_array_equal, pruned, wf.apply_masks(pruned, masks))
assert abs(wf.sparsity(masks) - 0.8) < 1e-3
untouched = np.mean((test[0] - test[1]) ** 2)
assert history[-1, 2] < untouched / 2
assert history[-1, 2] < 1.5 * dense_history[-1, 2]

# %% [markdown]
# The pruned network still removes more than half of the noise. The images show what the
# number does not.

# %%
merged = {
    name: nnx.merge(graph, net)(test[0][:8])
    for name, net in (("dense", dense), ("pruned to 80 %", pruned))
}
rows = {"noisy": test[0][:8], "clean": test[1][:8]} | merged
figure, axes = plt.subplots(4, 8, figsize=(8, 4.2), layout="constrained")
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(np.reshape(picture, (8, 8)), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, size="small")
plt.show()

# %% [markdown]
# ## Comparison of methods
#
# The methods differ most in one pruning step from the dense network without training
# afterwards. The loss need not be a cross entropy.

# %%
levels = (0.5, 0.6, 0.7, 0.8)
ways = {
    "global magnitude": {"method": "globalmagni"},
    "WoodFisher": {"method": "woodfisher"},
    "WoodFisher, joint update": {"method": "woodfisher", "update": "joint"},
}
error = {
    name: [
        float(loss_fn(wf.prune(loss_fn, dense, samples, sparsity=s, **how)[0], test))
        for s in levels
    ]
    for name, how in ways.items()
}
print(" " * 25 + "".join(f"{s:>9.0%}" for s in levels))
for name, values in error.items():
    print(f"{name:25}" + "".join(f"{value:9.4f}" for value in values))
for magnitude, single, joint in zip(*error.values(), strict=True):
    assert joint < single < magnitude

# %% [markdown]
# ## Saving
#
# The format `bitmask` stores one bit for each weight and the remaining weights, as
# [safetensors](https://github.com/huggingface/safetensors), without loss. (`masked` and
# `csr` are the other formats. The documentation has a reader in ten lines of NumPy, for
# use without this library.)

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "denoiser.safetensors"
    sparse_files.save_sparse(file, pruned, masks, "bitmask")
    size = file.stat().st_size
    arrays, stored_masks = sparse_files.load_sparse(file)
full = sum(leaf.nbytes for leaf in jax.tree.leaves(pruned))
print(f"{size:,} bytes of {full:,}: {size / full:.0%}")
assert size < 0.35 * full
kernels = {"encode/kernel/value": pruned.encode, "decode/kernel/value": pruned.decode}
for path, mask in masks.items():
    np.testing.assert_array_equal(arrays[path], kernels[path].kernel[...])
    np.testing.assert_array_equal(stored_masks[path], mask)

# %% [markdown]
# ## Checklist for a model of your own
#
# - The loss is a mean over examples without dropout: the Fisher is that of the network
#   as it is evaluated.
# - Batch norm: use running statistics in `loss_fn`, and pass them as
#   `jax.tree_util.Partial(loss, batch_stats)`, so that new ones do not compile again.
# - Prune in several steps, and train between them.
# - Start with `woodfisherblock`, which stores only one block of the
#   curvature at a time; set `block_size=` for large layers.
# - Where a network fits its training data perfectly, the gradients of its loss vanish.
#   `wf.projections` forms the curvature of its outputs instead, without labels.
