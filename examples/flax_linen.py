"""A convolutional network in Flax Linen, pruned to 90 % during training.

    python examples/flax_linen.py

Three statements in the training loop prune (marked 1, 2 and 3); one call prunes a
trained network from inputs alone. The data are the digits of scikit-learn; top-1 in
percent on 360 held-out images.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import woodfisher_jax as wf


class Net(nn.Module):
    """Two convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images [B, 8, 8, 1]."""
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def train(method: str | None, seed: int, epochs: int, sparsity: float) -> float:
    """Top-1 of a network that is trained, and pruned during or after that."""
    x, y = load_digits(return_X_y=True)
    images = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        images, y, test_size=360, random_state=0
    )
    model = Net()
    params = model.init(jax.random.key(seed), train_x[:1])
    logits_of = model.apply

    tx = wf.masked(optax.adam(3e-3), wf.init_masks(params))  # 1
    opt_state = tx.init(params)
    last = 22 * epochs
    levels = dict(wf.gradual(last // 2, last - 22, 44, 0.5, sparsity))  # 2

    def loss_fn(params, batch):
        x, y = batch
        logits = logits_of(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def train_step(params, opt_state, batch):
        gradients = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def top1(params):
        return 100 * jnp.mean(logits_of(params, test_x).argmax(-1) == test_y)

    for step in range(last):
        if method in wf.METHODS and step in levels:
            params, opt_state, _ = wf.prune_masked(  # 3
                loss_fn,
                params,
                opt_state,
                (train_x, train_y),
                sparsity=levels[step],
                method=method,
            )
        key = jax.random.fold_in(jax.random.key(seed), step)
        batch = jax.random.randint(key, (64,), 0, len(train_x))
        batch = train_x[batch], train_y[batch]
        params, opt_state = train_step(params, opt_state, batch)
    if method == "outputs":  # in one call, after training
        params, _, _ = wf.prune_outputs(logits_of, params, train_x, sparsity=sparsity)
    return float(top1(params))


def run(seed: int = 0, epochs: int = 8, sparsity: float = 0.9) -> dict[str, float]:
    """Top-1 of the dense and the pruned networks, after the same number of steps."""
    methods = {
        "dense": None,
        "woodfisher": "woodfisher",
        "magnitude": "globalmagni",
        "outputs": "outputs",
    }
    return {
        name: train(method, seed, epochs, sparsity) for name, method in methods.items()
    }


if __name__ == "__main__":
    print(run())
