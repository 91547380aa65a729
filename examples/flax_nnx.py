"""A perceptron in Flax NNX: split into a tree of arrays, pruned to 90 %, merged again.

    python examples/flax_nnx.py

Three statements in the training loop prune (marked 1, 2 and 3); one call prunes a
trained network from inputs alone. The data are the digits of scikit-learn; top-1 in
percent on 360 held-out images.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import woodfisher_jax as wf


class Net(nnx.Module):
    """64-64-32-10, with layer norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.second = nnx.Linear(64, 32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of [B, 64]."""
        x = nnx.relu(self.norm(self.first(x)))
        return self.last(nnx.relu(self.second(x)))


def train(method: str | None, seed: int, epochs: int, sparsity: float) -> float:
    """Top-1 of a network that is trained, and pruned during or after that."""
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (x / 16).astype("float32"), y, test_size=360, random_state=0
    )
    model = Net(nnx.Rngs(seed))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def logits_of(params, x):
        return nnx.merge(graph, params, rest)(x)

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


def run(seed: int = 0, epochs: int = 15, sparsity: float = 0.9) -> dict[str, float]:
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
