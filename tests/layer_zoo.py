"""Small networks of every kind of layer in four frameworks, and their layouts by hand.

A network is written with the layout of its framework. Beside it stands, for each of its
layers, how the kernel of Flax, (..., inputs, outputs), is read from the tensor: so the
same network has a twin whose layers are unstacked and in one layout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from arrays import normal
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from woodfisher_jax.trees.paths import leaves_by_path, replace_leaves

KEY = jax.random.key(0)
HEADS, HEAD_WIDTH, WIDTH = 2, 4, 6
LAYERS = 3
READ = Callable[[np.ndarray], np.ndarray]


class Network(NamedTuple):
    """A network with one kind of layer.

    Attributes:
        params: Its parameters, in the framework's own pytree.
        apply: (params, inputs) -> outputs.
        inputs: A batch.
        kernels: From the name of each layer to the path of its tensor, and what reads
            the kernel (..., inputs, outputs) from that.
        macs: Multiply-accumulates of one weight of each tensor for one example.
        heads: From path to the number of the head of each entry; None without heads.
    """

    params: Any
    apply: Callable[[Any, Any], jax.Array]
    inputs: Any
    kernels: dict[str, tuple[str, READ]]
    macs: dict[str, float]
    heads: dict[str, np.ndarray] | None = None

    def entries(self) -> dict[str, tuple[str, np.ndarray]]:
        """For each layer the path, and the flat place of each entry of its kernel."""
        shapes = {p: leaf.shape for p, leaf in leaves_by_path(self.params).items()}
        return {
            name: (path, read(np.arange(np.prod(shapes[path])).reshape(shapes[path])))
            for name, (path, read) in self.kernels.items()
        }

    def twin(self) -> dict[str, jax.Array]:
        """The kernels of all layers, by their names."""
        leaves = leaves_by_path(self.params)
        return {
            name: jnp.asarray(np.asarray(leaves[path]).reshape(-1)[places])
            for name, (path, places) in self.entries().items()
        }

    def joined(self, kernels: dict[str, jax.Array]) -> Any:
        """The parameters with the kernels in their places."""
        leaves = {p: jnp.asarray(a) for p, a in leaves_by_path(self.params).items()}
        for name, (path, places) in self.entries().items():
            flat = leaves[path].reshape(-1).at[places].set(kernels[name])
            leaves[path] = flat.reshape(leaves[path].shape)
        return replace_leaves(self.params, leaves)


def of_linen(module: nn.Module, inputs: Any) -> tuple[Any, Callable, str]:
    """Parameters, function and what paths end in."""
    params = module.init(KEY, inputs)["params"]
    return params, lambda p, x: module.apply({"params": p}, x), ""


def of_nnx(module: nnx.Module, call: Callable = lambda m, x: m(x)):
    """The same of an NNX module."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return params, lambda p, x: call(nnx.merge(graph, p, rest), x), "/value"


def of_equinox(module: eqx.Module, call: Callable = lambda m, x: jax.vmap(m)(x)):
    """The same of an Equinox module, which takes one example."""
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return params, lambda p, x: call(eqx.combine(p, rest), x), ""


def same(array: np.ndarray) -> np.ndarray:
    """A kernel as Flax has it."""
    return array


def turned(array: np.ndarray) -> np.ndarray:
    """From (outputs, inputs, ...) to (..., inputs, outputs)."""
    return np.moveaxis(array, (1, 0), (-2, -1))


def one(path: str, read: READ, macs: float, made: tuple, inputs: Any) -> Network:
    """A network of one layer."""
    params, apply, end = made
    path += end
    return Network(params, apply, inputs, {"layer/kernel": (path, read)}, {path: macs})


# -------------------------------------------------------- dense layers and convolutions


def dense(framework: str) -> Network:
    """From 6 inputs to 8 outputs, at 5 positions."""
    x = normal(1, 4, 5, WIDTH)
    if framework == "linen":
        return one("kernel", same, 5, of_linen(nn.Dense(8), x), x)
    if framework == "nnx":
        made = of_nnx(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)))
        return one("kernel", same, 5, made, x)
    if framework == "equinox":
        layer = eqx.nn.Linear(WIDTH, 8, key=KEY)
        made = of_equinox(layer, lambda m, x: jax.vmap(jax.vmap(m))(x))
        return one("weight", turned, 5, made, x)
    made = ({"w": normal(0, 8, WIDTH)}, lambda p, x: x @ p["w"].T, "")
    return one("w", turned, 5, made, x)


def convolution(framework: str, groups: int = 1) -> Network:
    """3 x 3, on images of 5 x 5 and 6 channels."""
    x = normal(1, 2, 5, 5, WIDTH)
    wide = WIDTH if groups > 1 else 8
    if framework == "linen":
        made = of_linen(nn.Conv(wide, (3, 3), feature_group_count=groups), x)
        return one("kernel", same, 25, made, x)
    if framework == "nnx":
        layer = nnx.Conv(
            WIDTH, wide, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0)
        )
        return one("kernel", same, 25, of_nnx(layer), x)
    x = jnp.moveaxis(x, -1, 1)
    if framework == "equinox":
        layer = eqx.nn.Conv2d(WIDTH, wide, 3, padding=1, groups=groups, key=KEY)
        return one("weight", turned, 25, of_equinox(layer), x)
    apply = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1, 1), "SAME", feature_group_count=groups
    )
    made = ({"w": normal(0, wide, WIDTH // groups, 3, 3)}, apply, "")
    return one("w", turned, 25, made, x)


def transposed(framework: str) -> Network:
    """2 x 2 with stride 2, from 3 x 3 and 6 channels."""
    x = normal(1, 2, 3, 3, WIDTH)
    swapped = lambda a: np.swapaxes(a, -1, -2)  # noqa: E731
    if framework == "linen":
        layer = nn.ConvTranspose(8, (2, 2), strides=(2, 2), transpose_kernel=True)
        return one("kernel", swapped, 9, of_linen(layer, x), x)
    if framework == "nnx":
        layer = nnx.ConvTranspose(WIDTH, 8, (2, 2), strides=2, rngs=nnx.Rngs(0))
        return one("kernel", same, 9, of_nnx(layer), x)
    x = jnp.moveaxis(x, -1, 1)
    if framework == "equinox":
        layer = eqx.nn.ConvTranspose2d(WIDTH, 8, 2, stride=2, key=KEY)
        return one("weight", turned, 9, of_equinox(layer), x)
    apply = lambda p, x: jax.lax.conv_transpose(  # noqa: E731
        x, p["w"], (2, 2), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    return one("w", same, 9, ({"w": normal(0, 2, 2, WIDTH, 8)}, apply, ""), x)


# ---------------------------------------------------------------------------- attention


def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of [..., positions, heads, width]."""
    weights = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k), axis=-1)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def attention(framework: str) -> Network:
    """Two heads over 5 positions, each projection a tensor."""
    x, inner = normal(1, 2, 5, WIDTH), HEADS * HEAD_WIDTH
    names = ("query", "key", "value", "out")
    if framework in ("linen", "nnx"):
        if framework == "linen":
            layer = nn.MultiHeadDotProductAttention(
                HEADS, qkv_features=inner, out_features=WIDTH
            )
            params, apply, end = of_linen(layer, x)
        else:
            layer = nnx.MultiHeadAttention(
                HEADS, WIDTH, inner, WIDTH, decode=False, rngs=nnx.Rngs(0)
            )
            params, apply, end = of_nnx(layer)
        paths = {name: f"{name}/kernel{end}" for name in names}
        into = lambda a: a.reshape(WIDTH, inner)  # noqa: E731
        out = lambda a: a.reshape(inner, WIDTH)  # noqa: E731
        head = {name: np.arange(HEADS)[:, None] for name in names[:3]}
        head["out"] = np.arange(HEADS)[:, None, None]
    elif framework == "equinox":
        layer = eqx.nn.MultiheadAttention(
            HEADS, WIDTH, qk_size=HEAD_WIDTH, vo_size=HEAD_WIDTH, key=KEY
        )
        params, apply, _ = of_equinox(layer, lambda m, x: jax.vmap(m)(x, x, x))
        paths = {name: f"{name}_proj/weight" for name in names[:3]}
        paths["out"] = "output_proj/weight"
        into = out = turned
        number = np.repeat(np.arange(HEADS), HEAD_WIDTH)
        head = {name: number[:, None] for name in names[:3]} | {"out": number}
    else:
        params = {n: normal(i, HEADS, WIDTH, HEAD_WIDTH) for i, n in enumerate(names)}
        paths = {name: name for name in names}

        def apply(p, x):
            q, k, v = (jnp.einsum("bpi,hid->bphd", x, p[n]) for n in names[:3])
            return jnp.einsum("bphd,hid->bpi", attended(q, k, v), p["out"])

        into = lambda a: np.moveaxis(a, 0, 1).reshape(WIDTH, inner)  # noqa: E731
        out = lambda a: np.moveaxis(a, 1, 2).reshape(inner, WIDTH)  # noqa: E731
        head = {name: np.arange(HEADS)[:, None, None] for name in names}
    kernels = {f"{n}/kernel": (paths[n], out if n == "out" else into) for n in names}
    return Network(
        params,
        apply,
        x,
        kernels,
        dict.fromkeys(paths.values(), 5),
        {paths[name]: number for name, number in head.items()},
    )


def fused(framework: str) -> Network:
    """Queries, keys and values in one tensor, head by head or one after another."""
    x, inner = normal(1, 2, 5, WIDTH), HEADS * HEAD_WIDTH

    def mixed(projected: jax.Array) -> jax.Array:
        parts = projected.reshape(*projected.shape[:2], HEADS, 3, HEAD_WIDTH)
        q, k, v = (parts[..., i, :] for i in range(3))
        return attended(q, k, v).reshape(*projected.shape[:2], inner)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, name="proj")(
                mixed(nn.Dense(3 * inner, name="qkv")(x))
            )

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.qkv = nnx.Linear(WIDTH, 3 * inner, rngs=rngs)
            self.proj = nnx.Linear(inner, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.proj(mixed(self.qkv(x)))

    number = np.repeat(np.arange(HEADS), 3 * HEAD_WIDTH)
    rows = np.repeat(np.arange(HEADS), HEAD_WIDTH)
    if framework in ("linen", "nnx"):
        made = (
            of_linen(Linen(), x) if framework == "linen" else of_nnx(Nnx(nnx.Rngs(0)))
        )
        params, apply, end = made
        paths, read = (f"qkv/kernel{end}", f"proj/kernel{end}"), (same, same)
        heads = {paths[0]: number, paths[1]: rows[:, None]}
    elif framework == "equinox":
        layers = {
            "qkv": eqx.nn.Linear(WIDTH, 3 * inner, key=KEY),
            "proj": eqx.nn.Linear(inner, WIDTH, key=KEY),
        }
        twice = lambda layer, x: jax.vmap(jax.vmap(layer))(x)  # noqa: E731
        params, apply, _ = of_equinox(
            layers, lambda m, x: twice(m["proj"], mixed(twice(m["qkv"], x)))
        )
        paths, read = ("qkv/weight", "proj/weight"), (turned, turned)
        heads = {paths[0]: number[:, None], paths[1]: rows}
    else:
        # As three slices of one tensor, and not head by head.
        params = {"qkv": normal(0, 3 * inner, WIDTH), "proj": normal(2, WIDTH, inner)}

        def apply(p, x):
            q, k, v = (
                (x @ part.T).reshape(*x.shape[:2], HEADS, HEAD_WIDTH)
                for part in jnp.split(p["qkv"], 3)
            )
            return attended(q, k, v).reshape(*x.shape[:2], inner) @ p["proj"].T

        paths, read = ("qkv", "proj"), (turned, turned)
        heads = {"qkv": np.tile(rows, 3)[:, None], "proj": rows}
    kernels = {"qkv/kernel": (paths[0], read[0]), "proj/kernel": (paths[1], read[1])}
    return Network(params, apply, x, kernels, dict.fromkeys(paths, 5), heads)


# ------------------------------------------------------------------- one tensor of many


def stacked(framework: str) -> Network:
    """Three dense layers one after another, in one tensor, by ``scan``."""
    x = normal(1, 4, WIDTH)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return jnp.tanh(layer(x)), None

            layer = nn.Dense(WIDTH, name="stack")
            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            return scan(layer, x, None)[0]

    read = same
    if framework == "linen":
        params, apply, _ = of_linen(Linen(), x)
        path = "stack/kernel"
    elif framework == "nnx":

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def many(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        params, apply, _ = of_nnx(many(nnx.Rngs(0)), lambda m, x: run(x, m))
        path = "kernel/value"
    elif framework == "equinox":
        keys = jax.random.split(KEY, LAYERS)
        layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(WIDTH, WIDTH, key=key))(keys)
        each, rest = eqx.partition(layers, eqx.is_array)

        def run(params, x):
            body = lambda h, p: (jnp.tanh(jax.vmap(eqx.combine(p, rest))(h)), None)  # noqa: E731
            return jax.lax.scan(body, x, params)[0]

        params, apply, path, read = each, run, "weight", np.transpose
    else:
        params, path, read = {"w": normal(0, WIDTH, LAYERS, WIDTH)}, "w", np.transpose

        def apply(p, x):
            step = lambda i, h: jnp.tanh(h @ p["w"][:, i].T)  # noqa: E731
            return jax.lax.fori_loop(0, LAYERS, step, x)

    kernels = {f"{i}/kernel": (path, _layer(i, read, framework)) for i in range(LAYERS)}
    return Network(params, apply, x, kernels, {path: 1})


def _layer(number: int, read: READ, framework: str) -> READ:
    axis = 1 if framework == "plain" else 0
    return lambda array: read(np.take(array, number, axis))


def experts(framework: str) -> Network:
    """Three dense layers side by side in one tensor, by ``vmap``."""
    x = normal(1, 4, LAYERS, WIDTH)
    read = same
    if framework == "linen":
        module = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=1,
            out_axes=1,
        )(8)
        params, apply, path = *of_linen(module, x)[:2], "kernel"
    elif framework == "nnx":

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def many(rngs):
            return nnx.Linear(WIDTH, 8, rngs=rngs)

        run = nnx.vmap(lambda m, x: m(x), in_axes=(0, 1), out_axes=1)
        params, apply, path = *of_nnx(many(nnx.Rngs(0)), run)[:2], "kernel/value"
    elif framework == "equinox":
        keys = jax.random.split(KEY, LAYERS)
        layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(WIDTH, 8, key=key))(keys)
        run = eqx.filter_vmap(lambda m, x: jax.vmap(m)(x), in_axes=(0, 1), out_axes=1)
        params, apply, path = *of_equinox(layers, run)[:2], "weight"
        read = np.transpose
    else:
        params, path, read = {"w": normal(0, LAYERS, 8, WIDTH)}, "w", np.transpose
        apply = lambda p, x: jnp.einsum("nei,eoi->neo", x, p["w"])  # noqa: E731
    kernels = {f"{i}/kernel": (path, _layer(i, read, "")) for i in range(LAYERS)}
    return Network(params, apply, x, kernels, {path: 1})


# -------------------------------------------------------------------------------- other


def tied(framework: str) -> Network:
    """An embedding that is the classifier as well, and a dense layer between."""
    tokens = jnp.arange(20).reshape(4, 5) % 10

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = nn.Embed(10, WIDTH, name="embed")
            return table.attend(jnp.tanh(nn.Dense(WIDTH, name="fc")(table(tokens))))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, WIDTH, rngs=rngs)
            self.fc = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.fc(self.embed(tokens))))

    read = same
    if framework == "linen":
        params, apply, _ = of_linen(Linen(), tokens)
        table, path = "embed/embedding", "fc/kernel"
    elif framework == "nnx":
        params, apply, _ = of_nnx(Nnx(nnx.Rngs(0)))
        table, path = "embed/embedding/value", "fc/kernel/value"
    elif framework == "equinox":
        layers = {
            "embed": eqx.nn.Embedding(10, WIDTH, key=KEY),
            "fc": eqx.nn.Linear(WIDTH, WIDTH, key=KEY),
        }

        def run(m, tokens):
            h = m["embed"].weight[tokens]
            return jnp.tanh(jax.vmap(jax.vmap(m["fc"]))(h)) @ m["embed"].weight.T

        params, apply, _ = of_equinox(layers, run)
        table, path, read = "embed/weight", "fc/weight", turned
    else:
        params = {"table": normal(0, WIDTH, 10), "w": normal(1, WIDTH, WIDTH)}
        table, path, read = "table", "w", turned
        apply = lambda p, t: jnp.tanh(p["table"].T[t] @ p["w"].T) @ p["table"]  # noqa: E731
    kernels = {
        "table/kernel": (table, same if framework == "plain" else turned),
        "fc/kernel": (path, read),
    }
    return Network(params, apply, tokens, kernels, {table: 5, path: 5})


def rematerialized(framework: str) -> Network:
    """The dense layer, computed again in the backward pass."""
    plain = dense(framework)
    x = plain.inputs
    if framework == "linen":
        return plain._replace(apply=of_linen(nn.remat(nn.Dense)(8), x)[1])
    if framework == "nnx":
        layer = nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0))
        call = nnx.remat(lambda m, x: m(x))
        return plain._replace(apply=of_nnx(layer, call)[1])
    wrap = eqx.filter_checkpoint if framework == "equinox" else jax.checkpoint
    return plain._replace(apply=wrap(plain.apply))


def sharded(framework: str) -> Network:
    """The dense layer with its parameters and its result placed on a mesh."""
    plain = dense(framework)
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    placed = NamedSharding(mesh, PartitionSpec("model"))

    def apply(params, x):
        constrained = jax.tree.map(
            partial(jax.lax.with_sharding_constraint, shardings=placed), params
        )
        return jax.lax.with_sharding_constraint(plain.apply(constrained, x), placed)

    params = jax.tree.map(lambda a: jax.device_put(a, placed), plain.params)
    return plain._replace(params=params, apply=apply)


FRAMEWORKS = ("linen", "nnx", "equinox", "plain")
KINDS: dict[str, Callable[[str], Network]] = {
    "dense": dense,
    "convolution": convolution,
    "depthwise convolution": partial(convolution, groups=WIDTH),
    "transposed convolution": transposed,
    "attention": attention,
    "fused qkv": fused,
    "stacked by scan": stacked,
    "experts by vmap": experts,
    "tied embedding": tied,
    "remat": rematerialized,
    "sharded": sharded,
}
