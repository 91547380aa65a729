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
# # Prune a language model on a laptop
#
# A language model is pruned without labels, gradients or training: each of its matrices
# loses weights, and those that stay are moved so that its outputs stay. A few thousand
# tokens of text suffice. SmolLM2-135M takes six minutes of one core.
#
# As it stands, this notebook uses a tiny model with random weights, so that it runs in
# half a minute without a download. With `FOLDER` and `TEXT` in the next cell it prunes
# yours.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import woodfisher_jax as wf
from woodfisher_jax.data.tokens import read_tokens
from woodfisher_jax.models.llama import Llama, LlamaConfig
from woodfisher_jax.training.language.perplexity import perplexity
from woodfisher_jax.weights import hugging_face

FOLDER = None
TEXT = None

# %% [markdown]
# **A model of your own.** `FOLDER` is a folder of Hugging Face's Transformers with
# `config.json`, `model.safetensors` and `tokenizer.json` of a model of Llama's form
# (SmolLM2, TinyLlama, Llama). This fetches one of 270 MB:
#
# ```bash
# pip install huggingface_hub
# hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir smollm2
# ```
#
# Then `FOLDER = "smollm2"`, and `TEXT` is a folder of `.txt` files such as
# books; each file is a kind of text. A quarter of each file is kept apart to evaluate
# on.
#
# ## The model and its text
#
# The tiny model writes its own text: what it has written it predicts well, and it
# predicts it worse when it is damaged.


# %%
def tiny():
    """A random model and sequences that are sampled from it."""
    model = Llama(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    start = jnp.zeros((48, 64), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), start)["params"]
    # Weights of 0.02 would hardly do anything.
    params = jax.tree.map(lambda w: 12 * w if w.ndim == 2 else w, params)

    @jax.jit
    def write(params, tokens, key):
        def one(place, tokens):
            logits = model.apply({"params": params}, tokens)[:, place - 1]
            own = jax.random.fold_in(key, place)
            return tokens.at[:, place].set(jax.random.categorical(own, logits))

        return jax.lax.fori_loop(1, tokens.shape[1], one, tokens)

    tokens = np.asarray(write(params, start, jax.random.key(1)))
    return model, params, tokens[:32], tokens[32:]


if FOLDER is None:
    model, params, calibration, evaluation = tiny()
else:
    model, params = hugging_face.read_folder(FOLDER)
    text = read_tokens(TEXT, model.config.vocab_size, tokenizer=FOLDER)
    calibration, evaluation = text.calibration[:32], text.evaluation[:12]


def net(params, tokens):
    return model.apply({"params": params}, tokens)


def measured(params):
    return perplexity(net, params, evaluation).all


dense = measured(params)
print(f"{calibration.size:,} tokens to prune with, {evaluation.size:,} to evaluate on")
print(f"perplexity of the dense model: {dense:.2f}")

# %% [markdown]
# ## One call
#
# `wf.prune_layerwise` takes the model as a function of parameters and tokens. It finds
# the matrices in the function itself, and goes through them in their order, each on
# inputs that come from layers already pruned. The embedding and the head stay as they
# are.

# %%
blocks = r"layers_\d+/.*kernel"
pruned, masks, info = wf.prune_layerwise(
    net, params, calibration, sparsity=0.6, prunable=blocks
)
print(
    f"{info.sparsity:.1%} of {info.prunable:,} weights in {len(info.layers)} matrices"
)
print(f"perplexity: {measured(pruned):.2f}")
# Pruned weights are exactly zero.
jax.tree.map(np.testing.assert_array_equal, pruned, wf.apply_masks(pruned, masks))
assert abs(wf.sparsity(masks) - 0.6) < 1e-2

# %% [markdown]
# ## Where it hurts
#
# `info.layers` has the error of each matrix: how far its outputs are from those of the
# dense matrix on the same inputs, as a share of their energy.

# %%
parts = {layer.path.split("/")[-2]: None for layer in info.layers}
error = np.array([layer.error for layer in info.layers]).reshape(-1, len(parts)).T
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
picture = axis.imshow(error, cmap="Blues", aspect="auto", vmin=0)
axis.set(xlabel="block", xticks=range(error.shape[1]), yticks=range(len(parts)))
axis.set_yticklabels(parts)
figure.colorbar(picture, label="relative squared error")
plt.show()
assert (error > 0).all()
assert (error < 1).all()

# %% [markdown]
# ## More time, lower perplexity
#
# - **Magnitude** looks at no text: the smallest weights of each matrix go.
# - **`scope="global"`** shares the weights out over the matrices by what they mean to
#   the model's outputs.
# - **`repair=4`** moves the weights of a block once more, so that its output as a whole
#   stays: four passes of Adam.
#
# `pattern="2:4"` in place of a sparsity keeps two of each four inputs.

# %%
ways = {
    "scope='global'": {"scope": "global", "metric": "softmax"},
    "repair=4": {"repair": 4},
}
by_size, _, _ = wf.prune(
    None, params, method="magni", sparsity=0.6, prunable=blocks, scope="layer"
)
found = {"magnitude": measured(by_size), "as above": measured(pruned)}
for name, options in ways.items():
    weights, _, _ = wf.prune_layerwise(
        net, params, calibration, sparsity=0.6, prunable=blocks, **options
    )
    found[name] = measured(weights)
for name, value in found.items():
    print(f"{name:16} {value:8.2f}")
assert found["as above"] < found["magnitude"]
assert max(found["scope='global'"], found["repair=4"]) < found["as above"]

# %% [markdown]
# Random weights have little to spare, and the differences on a trained model are
# larger: 60 % of SmolLM2-135M by magnitude raise its perplexity from 39 to 5,074, by
# the call above to 82, and with `scope="global"` and `damping=0.15` to 67.
#
# ## Saving
#
# The folder that is written has Hugging Face's names, and `transformers` loads it as it
# does the source. The commands do all of this notebook in one line:
#
# ```bash
# python -m woodfisher_jax.main --config=smollm2 --config.init_from=smollm2 \
#     --config.data.dir=texts --workdir=runs/smollm2
# ```

# %%
if FOLDER is not None:
    hugging_face.write_folder(f"{FOLDER}-pruned", pruned, FOLDER)
