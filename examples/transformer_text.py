"""A small decoder-only transformer on Python's manual, pruned to 90 %.

    python examples/transformer_text.py

It models the help texts that ship with Python, character by character; a tenth of the
topics is held out for the perplexity. Three statements in the training loop prune
(marked 1, 2 and 3).
"""

from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import woodfisher_jax as wf

HEADS, WIDTH, DEPTH, CONTEXT = 4, 64, 2, 64


def texts() -> tuple[np.ndarray, np.ndarray]:
    """ASCII codes of the training topics and of the held-out topics."""
    names = sorted(topics)
    parts = [names[i::10] for i in range(10)]
    held_out, others = parts[0], [name for part in parts[1:] for name in part]

    def codes(names):
        text = "\n\n".join(topics[name] for name in names)
        return np.frombuffer(text.encode("ascii", "ignore"), np.uint8).clip(0, 127)

    return codes(others), codes(held_out)


def windows(codes, number: int, rng: np.random.Generator) -> jax.Array:
    """Random pieces of a text [number, CONTEXT + 1]."""
    starts = rng.integers(0, len(codes) - CONTEXT, number)
    return jnp.asarray(codes[starts[:, None] + np.arange(CONTEXT + 1)], jnp.int32)


def init(seed: int) -> dict:
    """Parameters."""
    rng = np.random.default_rng(seed)

    def normal(inputs: int, outputs: int) -> jax.Array:
        return jnp.float32(rng.standard_normal((inputs, outputs)) / inputs**0.5)

    blocks = [
        {
            "qkv": normal(WIDTH, 3 * WIDTH),
            "out": normal(WIDTH, WIDTH) / 2,
            "up": normal(WIDTH, 4 * WIDTH),
            "down": normal(4 * WIDTH, WIDTH) / 2,
        }
        for _ in range(DEPTH)
    ]
    letters = jnp.float32(0.1 * rng.standard_normal((128, WIDTH)))
    places = jnp.float32(0.1 * rng.standard_normal((CONTEXT, WIDTH)))
    head = normal(WIDTH, 128)
    return {"letters": letters, "places": places, "blocks": blocks, "head": head}


def logits_of(params: dict, tokens: jax.Array) -> jax.Array:
    """Logits of the next character [B, T, 128] from characters [B, T]."""
    batch, length = tokens.shape
    x = params["letters"][tokens] + params["places"][:length]
    for block in params["blocks"]:
        qkv = (normalized(x) @ block["qkv"]).reshape(batch, length, 3, HEADS, -1)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + y.reshape(batch, length, -1) @ block["out"]
        x = x + jax.nn.gelu(normalized(x) @ block["up"]) @ block["down"]
    return normalized(x) @ params["head"]


def normalized(x: jax.Array) -> jax.Array:
    """Layer norm without parameters."""
    return jax.nn.standardize(x, epsilon=1e-5)


def loss_fn(params: dict, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next character, in nats."""
    logits = logits_of(params, tokens[:, :-1])
    targets = tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train(
    method: str | None, seed: int, steps: int, sparsity: float, num_samples: int
) -> float:
    """Perplexity of a network that is trained, and pruned during or after that."""
    training, held_out = texts()
    rng = np.random.default_rng(seed)
    samples = windows(training, num_samples, rng)
    test = windows(held_out, 512, np.random.default_rng(0))

    params = init(seed)
    # The matrices of the blocks and the head; embeddings stay dense.
    tx = wf.masked(optax.adam(3e-3), wf.init_masks(params, prunable="blocks|head"))  # 1
    opt_state = tx.init(params)
    start, end = steps // 2, steps * 9 // 10
    levels = dict(wf.gradual(start, end, (end - start) // 4, 0.5, sparsity))  # 2

    @jax.jit
    def train_step(params, opt_state, tokens):
        gradients = jax.grad(loss_fn)(params, tokens)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def perplexity(params):
        return jnp.exp(loss_fn(params, test))

    for step in range(steps):
        if method in wf.METHODS and step in levels:
            params, opt_state, _ = wf.prune_masked(  # 3
                loss_fn,
                params,
                opt_state,
                samples,
                sparsity=levels[step],
                method=method,
            )
        tokens = windows(training, 16, rng)
        params, opt_state = train_step(params, opt_state, tokens)
    if method == "outputs":  # in one call, after training
        params, _, _ = wf.prune_outputs(
            logits_of,
            params,
            samples[:, :-1],
            sparsity=sparsity,
            prunable="blocks|head",
        )
    return float(perplexity(params))


def run(
    seed: int = 0, steps: int = 600, sparsity: float = 0.9, num_samples: int = 200
) -> dict[str, float]:
    """Perplexity of the dense and the pruned networks, after the same steps."""
    methods = {
        "dense": None,
        "woodfisher": "woodfisherblock",
        "magnitude": "globalmagni",
        "outputs": "outputs",
    }
    return {
        name: train(method, seed, steps, sparsity, num_samples)
        for name, method in methods.items()
    }


if __name__ == "__main__":
    print(run())
