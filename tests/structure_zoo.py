"""Small networks with structure that can be taken out, in four frameworks.

A network is written once, as a function of named layers; a framework says what these
layers are. The same network with half the widths says what shapes are left.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from arrays import normal
from flax import nnx
from layer_zoo import FRAMEWORKS, KEY, attended

__all__ = ["FRAMEWORKS", "KINDS", "Made", "attended", "made", "normal"]

HEAD_WIDTH, ROUNDS = 3, 2


class Layer(NamedTuple):
    """What a network is made of.

    Attributes:
        kind: "dense", "conv", "batch_norm", "layer_norm", "embed" or "stack": several
            pairs of dense layers, each added to what it reads, by ``scan``.
        inputs: Features.
        outputs: Features.
        groups: Of a convolution.
        size: Of its windows.
    """

    kind: str
    inputs: int
    outputs: int = 0
    groups: int = 1
    size: int = 1


class Made(NamedTuple):
    """A network of one framework.

    Attributes:
        params: A pytree with all arrays that get smaller, unless ``net_fn`` holds them.
        net_fn: (params, inputs) -> outputs.
        inputs: Two examples.
    """

    params: Any
    net_fn: Callable[[Any, Any], jax.Array]
    inputs: jax.Array


class Kind(NamedTuple):
    """A network of any framework.

    Attributes:
        number: How many structures it has.
        layers: Its layers when widths are multiplied by 2 or 1.
        forward: (layers, inputs) -> outputs.
        inputs: Two examples.
    """

    number: int
    layers: Callable[[int], dict[str, Layer]]
    forward: Callable[[Any, jax.Array], jax.Array]
    inputs: jax.Array


# -------------------------------------------------------------------------- frameworks


def each(function: Callable, x: jax.Array, last: int = 1) -> jax.Array:
    """A function of one position applied to all of them."""
    for _ in range(x.ndim - last):
        function = jax.vmap(function)
    return function(x)


def plain(layers: Mapping[str, Layer]) -> tuple[Any, Callable]:
    params: dict[str, dict[str, jax.Array]] = {}
    calls: dict[str, Callable] = {}
    for i, (name, layer) in enumerate(layers.items()):
        n, m = layer.inputs, layer.outputs
        if layer.kind == "dense":
            own = {"w": normal(i, n, m), "b": normal(i + 50, m)}
            call = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
        elif layer.kind == "conv":
            shape = (layer.size, layer.size, n // layer.groups, m)
            own = {"w": normal(i, *shape), "b": normal(i + 50, m)}

            def call(p, x, groups=layer.groups):
                # Groups of one channel are as many as there are channels.
                number = x.shape[-1] if p["w"].shape[2] == 1 else groups
                return p["b"] + jax.lax.conv_general_dilated(
                    x,
                    p["w"],
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    feature_group_count=number,
                )
        elif layer.kind == "batch_norm":
            own = {k: normal(i + j, n) for j, k in enumerate(("s", "b", "mean"))}
            own["var"] = normal(i + 9, n) ** 2
            call = lambda p, x: (  # noqa: E731
                (x - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3) * p["s"] + p["b"]
            )
        elif layer.kind == "layer_norm":
            own = {"s": normal(i, n)}
            call = lambda p, x: p["s"] * jax.nn.standardize(x)  # noqa: E731
        elif layer.kind == "embed":
            own = {"table": normal(i, n, m)}
            call = lambda p, x: (  # noqa: E731
                p["table"][x] if x.dtype == jnp.int32 else x @ p["table"].T
            )
        else:
            own = {"up": normal(i, ROUNDS, n, m), "down": normal(i + 9, ROUNDS, m, n)}

            def call(p, x):
                step = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)  # noqa: E731
                return jax.lax.scan(step, x, p)[0]

        params[name], calls[name] = own, call

    def bound(params: Any) -> SimpleNamespace:
        return SimpleNamespace(
            **{
                name: lambda x, name=name: calls[name](params[name], x)
                for name in layers
            }
        )

    return params, bound


class LinenPair(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        inner = jnp.tanh(nn.Dense(self.width, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(inner), None


def linen_layer(layer: Layer) -> nn.Module:
    if layer.kind == "dense":
        return nn.Dense(layer.outputs)
    if layer.kind == "conv":
        size = (layer.size, layer.size)
        return nn.Conv(layer.outputs, size, feature_group_count=layer.groups)
    if layer.kind == "batch_norm":
        return nn.BatchNorm(use_running_average=True)
    if layer.kind == "layer_norm":
        return nn.LayerNorm()
    if layer.kind == "embed":
        return nn.Embed(layer.inputs, layer.outputs)
    stack = nn.scan(
        LinenPair,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=ROUNDS,
    )
    return stack(layer.outputs)


class LinenNet(nn.Module):
    layers: Any
    forward: Callable

    def setup(self):
        self.made = {name: linen_layer(layer) for name, layer in self.layers}
        self.drop = nn.Dropout(0.5, deterministic=True)

    def __call__(self, x):
        def call(name: str, kind: str) -> Callable:
            layer = self.made[name]
            if kind == "stack":
                return lambda x: layer(x, None)[0]
            if kind == "embed":
                return lambda x: (layer if x.dtype == jnp.int32 else layer.attend)(x)
            return layer

        own = {name: call(name, layer.kind) for name, layer in self.layers}
        return self.forward(SimpleNamespace(drop=self.drop, **own), x)


class NnxPair(nnx.Module):
    def __init__(self, layer: Layer, rngs):
        self.up = nnx.Linear(layer.inputs, layer.outputs, rngs=rngs)
        self.down = nnx.Linear(layer.outputs, layer.inputs, rngs=rngs)


def nnx_layer(layer: Layer) -> nnx.Module:
    n, m, rngs = layer.inputs, layer.outputs, nnx.Rngs(0)
    if layer.kind == "dense":
        return nnx.Linear(n, m, rngs=rngs)
    if layer.kind == "conv":
        size = (layer.size, layer.size)
        return nnx.Conv(n, m, size, feature_group_count=layer.groups, rngs=rngs)
    if layer.kind == "batch_norm":
        return nnx.BatchNorm(n, use_running_average=True, rngs=rngs)
    if layer.kind == "layer_norm":
        return nnx.LayerNorm(n, rngs=rngs)
    if layer.kind == "embed":
        return nnx.Embed(n, m, rngs=rngs)

    @nnx.split_rngs(splits=ROUNDS)
    @nnx.vmap
    def many(rngs):
        return NnxPair(layer, rngs)

    return many(rngs)


class NnxNet(nnx.Module):
    def __init__(self, layers: Mapping[str, Layer]):
        for name, layer in layers.items():
            setattr(self, name, nnx_layer(layer))


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def nnx_rounds(x, pair):
    return x + pair.down(jnp.tanh(pair.up(x)))


def nnx_call(layer: nnx.Module) -> Callable:
    if isinstance(layer, NnxPair):
        return lambda x: nnx_rounds(x, layer)
    if isinstance(layer, nnx.Embed):
        return lambda x: (layer if x.dtype == jnp.int32 else layer.attend)(x)
    return layer


class EquinoxPair(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, layer: Layer, key):
        self.up = eqx.nn.Linear(layer.inputs, layer.outputs, key=key)
        self.down = eqx.nn.Linear(layer.outputs, layer.inputs, key=key)


def equinox_layer(layer: Layer) -> Any:
    n, m = layer.inputs, layer.outputs
    if layer.kind == "dense":
        return eqx.nn.Linear(n, m, key=KEY)
    if layer.kind == "conv":
        size, groups = layer.size, layer.groups
        return eqx.nn.Conv2d(n, m, size, padding="SAME", groups=groups, key=KEY)
    if layer.kind == "batch_norm":
        return eqx.nn.BatchNorm(n, axis_name="batch", mode="batch", inference=True)
    if layer.kind == "layer_norm":
        return eqx.nn.LayerNorm(n)
    if layer.kind == "embed":
        return eqx.nn.Embedding(n, m, key=KEY)
    keys = jax.random.split(KEY, ROUNDS)
    return eqx.filter_vmap(lambda key: EquinoxPair(layer, key))(keys)


def equinox_call(layer: Any, state: Any) -> Callable:
    if isinstance(layer, eqx.nn.Linear):
        return lambda x: each(layer, x)
    if isinstance(layer, eqx.nn.Conv2d):
        return lambda x: jnp.moveaxis(each(layer, jnp.moveaxis(x, -1, 1), 3), 1, -1)
    if isinstance(layer, eqx.nn.BatchNorm):
        return lambda x: jnp.moveaxis(
            jax.vmap(lambda x: layer(x, state)[0])(jnp.moveaxis(x, -1, 1)), 1, -1
        )
    if isinstance(layer, eqx.nn.LayerNorm):
        return lambda x: each(layer, x)
    if isinstance(layer, eqx.nn.Embedding):
        return lambda x: layer.weight[x] if x.dtype == jnp.int32 else x @ layer.weight.T
    arrays, rest = eqx.partition(layer, eqx.is_array)

    def step(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
        pair = eqx.combine(own, rest)
        return x + each(lambda x: pair.down(jnp.tanh(pair.up(x))), x), None

    return lambda x: jax.lax.scan(step, x, arrays)[0]


def made(framework: str, kind: str, factor: int = 2) -> Made:
    """A network of one framework, with widths multiplied by 2 or 1."""
    _, layers, forward, x = KINDS[kind]
    layers = layers(factor)
    if framework == "plain":
        params, bound = plain(layers)
        same = lambda x: x  # noqa: E731

        def net_fn(params, x):
            own = bound(params)
            own.drop = same
            return forward(own, x)

        return Made(params, net_fn, x)
    if framework == "linen":
        module = LinenNet(tuple(layers.items()), forward)
        return Made(module.init(KEY, x), module.apply, x)
    if framework == "nnx":
        learned = nnx.Any(nnx.Param, nnx.BatchStat)
        graph, params, rest = nnx.split(NnxNet(layers), learned, ...)
        drop = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))

        def net_fn(params, x):
            net = nnx.merge(graph, params, rest)
            own = {name: nnx_call(getattr(net, name)) for name in layers}
            return forward(SimpleNamespace(drop=drop, **own), x)

        return Made(params, net_fn, x)
    net, state = eqx.nn.make_with_state(
        lambda: {name: equinox_layer(layer) for name, layer in layers.items()}
    )()
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    drop = eqx.nn.Dropout(0.5, inference=True)

    def net_fn(params, x):
        net = eqx.combine(params, rest)
        own = {name: equinox_call(layer, state) for name, layer in net.items()}
        return forward(SimpleNamespace(drop=drop, **own), x)

    return Made(params, net_fn, x)


# ---------------------------------------------------------------------------- networks


def pooled(x: jax.Array) -> jax.Array:
    return x.mean((1, 2))


def grouped_queries(net: Any, x: jax.Array) -> jax.Array:
    """Each head of keys and values has two of queries."""
    k, v = (f(x).reshape(*x.shape[:2], -1, HEAD_WIDTH) for f in (net.k, net.v))
    q = net.q(x).reshape(*x.shape[:2], k.shape[2], 2, HEAD_WIDTH)
    mixed = jax.vmap(attended, (3, None, None), 3)(q, k, v)
    return net.out(mixed.reshape(*x.shape[:2], -1))


def gated(net: Any, x: jax.Array) -> jax.Array:
    up, gate = jnp.split(net.up(x), 2, axis=-1)
    return net.down(up * jax.nn.silu(gate))


IMAGES, ROWS = normal(1, 2, 4, 4, 3), normal(1, 2, 5, 6)
TOKENS = jnp.arange(10).reshape(2, 5)

KINDS: dict[str, Kind] = {
    # A stream and what is within a block: 4 + 6.
    "residual": Kind(
        10,
        lambda f: {
            "stem": Layer("conv", 3, 2 * f),
            "a": Layer("conv", 2 * f, 3 * f, size=3),
            "b": Layer("conv", 3 * f, 2 * f, size=3),
            "head": Layer("dense", 2 * f, 2),
        },
        lambda net, x: net.head(
            pooled((h := net.stem(x)) + net.b(jax.nn.relu(net.a(h))))
        ),
        IMAGES,
    ),
    # Both branches: 4 + 6.
    "concat": Kind(
        10,
        lambda f: {
            "a": Layer("conv", 3, 2 * f),
            "b": Layer("conv", 3, 3 * f, size=3),
            "head": Layer("dense", 5 * f, 2),
        },
        lambda net, x: net.head(pooled(jnp.concatenate([net.a(x), net.b(x)], -1))),
        IMAGES,
    ),
    # A channel has its own window.
    "depthwise": Kind(
        4,
        lambda f: {
            "a": Layer("conv", 3, 2 * f),
            "window": Layer("conv", 2 * f, 2 * f, 2 * f, 3),
            "head": Layer("dense", 2 * f, 2),
        },
        lambda net, x: net.head(pooled(jax.nn.relu(net.window(net.a(x))))),
        IMAGES,
    ),
    # Both groups lose alike: 8 / 2 + 12 / 2.
    "grouped": Kind(
        10,
        lambda f: {
            "a": Layer("conv", 3, 4 * f),
            "b": Layer("conv", 4 * f, 6 * f, 2, 3),
            "head": Layer("dense", 6 * f, 2),
        },
        lambda net, x: net.head(pooled(jax.nn.relu(net.b(net.a(x))))),
        IMAGES,
    ),
    # Heads of keys and values, each with its two of queries.
    "grouped queries": Kind(
        2,
        lambda f: {
            "q": Layer("dense", 6, 2 * HEAD_WIDTH * f),
            "k": Layer("dense", 6, HEAD_WIDTH * f),
            "v": Layer("dense", 6, HEAD_WIDTH * f),
            "out": Layer("dense", 2 * HEAD_WIDTH * f, 6),
        },
        grouped_queries,
        ROWS,
    ),
    # A neuron is in both halves of the first layer.
    "gated MLP": Kind(
        8,
        lambda f: {"up": Layer("dense", 6, 8 * f), "down": Layer("dense", 4 * f, 6)},
        gated,
        ROWS,
    ),
    # The same neurons of all rounds.
    "stacked by scan": Kind(
        8,
        lambda f: {"stack": Layer("stack", 6, 4 * f)},
        lambda net, x: net.stack(x),
        ROWS,
    ),
    # The features of the table are what the dense layer reads and gives.
    "tied embedding": Kind(
        8,
        lambda f: {
            "table": Layer("embed", 10, 4 * f),
            "a": Layer("dense", 4 * f, 4 * f),
        },
        lambda net, x: net.table(jnp.tanh(net.a(net.table(x)))),
        TOKENS,
    ),
    "batch norm": Kind(
        4,
        lambda f: {
            "a": Layer("conv", 3, 2 * f, size=3),
            "norm": Layer("batch_norm", 2 * f),
            "head": Layer("dense", 2 * f, 2),
        },
        lambda net, x: net.head(pooled(jax.nn.relu(net.norm(net.a(x))))),
        IMAGES,
    ),
    # What the norm takes its mean of stays: the 4 after that.
    "layer norm": Kind(
        4,
        lambda f: {
            "a": Layer("dense", 6, 8),
            "norm": Layer("layer_norm", 8),
            "b": Layer("dense", 8, 2 * f),
            "c": Layer("dense", 2 * f, 2),
        },
        lambda net, x: net.c(jnp.tanh(net.b(net.norm(net.a(x))))),
        ROWS,
    ),
    "dropout": Kind(
        8,
        lambda f: {"a": Layer("dense", 6, 4 * f), "b": Layer("dense", 4 * f, 2)},
        lambda net, x: net.b(net.drop(jnp.tanh(net.a(x)))),
        ROWS,
    ),
    # A channel is 16 inputs of the dense layer.
    "reshape to dense": Kind(
        4,
        lambda f: {
            "a": Layer("conv", 3, 2 * f, size=3),
            "b": Layer("dense", 32 * f, 2),
        },
        lambda net, x: net.b(net.a(x).reshape(len(x), -1)),
        IMAGES,
    ),
}
