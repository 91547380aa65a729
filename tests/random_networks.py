"""Networks by chance: a few layers of many kinds, one after another."""

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from structure_zoo import attended

Layer = Callable[[dict, jax.Array], jax.Array]
"""(params, activations) -> activations."""


class Maker:
    """Draws layers and their parameters.

    Attributes:
        params: Of all layers so far.
        said: Their kinds, in order.
    """

    def __init__(self, chance: random.Random):
        self.chance, self.params, self.said = chance, {}, []
        self._numbers = np.random.default_rng(chance.randrange(10**6))

    def new(self, *shape: int) -> str:
        """A new parameter, by its name."""
        name = f"p{len(self.params):02}"
        fan = max(1, int(np.prod(shape[:-1])))
        array = self._numbers.normal(size=shape) / np.sqrt(fan)
        self.params[name] = jnp.asarray(array, jnp.float32)
        return name

    def width(self) -> int:
        """Of a layer; it may be cut into two or four."""
        return self.chance.choice([4, 8])

    def bias(self, n: int) -> Callable[[dict], jax.Array]:
        """A bias, or none."""
        if self.chance.random() < 0.4:
            return lambda p: 0.0
        name = self.new(n)
        return lambda p: p[name]

    # ------------------------------------------------------------------- any last axis

    def dense(self, n: int, m: int) -> Layer:
        """A product from either side, in either layout."""
        bias = self.bias(m)
        if self.chance.random() < 0.5:
            w = self.new(m, n)
            return lambda p, x: jnp.einsum("oi,...i->...o", p[w], x) + bias(p)
        w = self.new(n, m)
        return lambda p, x: x @ p[w] + bias(p)

    def activation(self, n: int) -> tuple[Layer, int]:
        function = self.chance.choice([jax.nn.relu, jnp.tanh, jax.nn.silu])
        return lambda p, x: function(x), n

    def norm(self, n: int) -> tuple[Layer, int]:
        """Of a batch: a factor and a shift for each channel; or over channels."""
        s, b = self.new(n), self.new(n)
        if self.chance.random() < 0.7:
            return lambda p, x: x * p[s] + p[b], n
        groups = self.chance.choice([1, 2])

        def call(p, x):
            parts = x.reshape(*x.shape[:-1], groups, -1)
            return jax.nn.standardize(parts).reshape(x.shape) * p[s] + p[b]

        return call, n

    def mixed(self, n: int, m: int) -> Layer:
        """What mixes channels: overridden for images."""
        return self.dense(n, m)

    def plain(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        return self.mixed(n, m), m

    def residual(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        a, b = self.mixed(n, m), self.mixed(m, n)
        return lambda p, x: x + b(p, jnp.tanh(a(p, x))), n

    def concat(self, n: int) -> tuple[Layer, int]:
        m, k = self.width(), self.width()
        a, b = self.mixed(n, m), self.mixed(n, k)
        return lambda p, x: jnp.concatenate([a(p, x), jnp.tanh(b(p, x))], -1), m + k

    def gated(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        up = self.mixed(n, 2 * m)

        def call(p, x):
            a, b = jnp.split(up(p, x), 2, axis=-1)
            return a * jax.nn.sigmoid(b)

        return call, m

    def pairs(self, n: int) -> tuple[Layer, int]:
        """Gated, each channel by the next one."""
        m = self.width()
        up = self.mixed(n, 2 * m)

        def call(p, x):
            both = up(p, x)
            return both[..., ::2] * jax.nn.sigmoid(both[..., 1::2])

        return call, m

    def shuffle(self, n: int) -> tuple[Layer, int]:
        """Channels of two groups, one by one."""
        return (
            lambda p, x: jnp.swapaxes(x.reshape(*x.shape[:-1], 2, -1), -1, -2).reshape(
                x.shape
            ),
            n,
        )

    def padded(self, n: int) -> tuple[Layer, int]:
        """A shortcut with more channels, which are zero."""
        wide = self.mixed(n, n + 4)

        def call(p, x):
            low = [(0, 0)] * (x.ndim - 1)
            return wide(p, x) + jnp.pad(x, [*low, (2, 2)])

        return call, n + 4

    def halves(self, n: int) -> tuple[Layer, int]:
        """One half goes on as it is."""
        inner = self.mixed(n // 2, n // 2)

        def call(p, x):
            a, b = x[..., : n // 2], x[..., n // 2 :]
            return jnp.concatenate([b, inner(p, a)], -1)

        return call, n

    def branches(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        a, b = self.mixed(n, m), self.mixed(n, m)

        def call(p, x):
            return jax.lax.cond(
                x.ravel()[0] > 0, lambda x: a(p, x), lambda x: jnp.tanh(b(p, x)), x
            )

        return call, m

    def excited(self, n: int) -> tuple[Layer, int]:
        """Every channel times a number of its own."""
        a, b = self.dense(n, 4), self.dense(4, n)

        def call(p, x):
            mean = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
            return x * jax.nn.sigmoid(b(p, jax.nn.relu(a(p, mean))))

        return call, n

    COMMON = (
        "activation norm plain plain residual concat gated pairs shuffle padded "
        "halves branches excited"
    )

    def step(self, n: int) -> tuple[Layer, int]:
        """A layer after one of n channels, and how many it has."""
        kind = self.chance.choice(self.KINDS.split())
        self.said.append(kind)
        return getattr(self, kind)(n)


class OfImages(Maker):
    """Layers of images [examples, height, width, channels]."""

    KINDS = Maker.COMMON + " depthwise grouped strided transposed pooled"

    def conv(self, n: int, m: int, groups: int = 1, **settings: Any) -> Layer:
        size = self.chance.choice([1, 3])
        w, bias = self.new(size, size, n // groups, m), self.bias(m)
        settings = {"window_strides": (1, 1), "padding": "SAME"} | settings

        def call(p, x):
            return bias(p) + jax.lax.conv_general_dilated(
                x,
                p[w],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
                **settings,
            )

        return call

    def mixed(self, n: int, m: int) -> Layer:
        dilation = self.chance.choice([(1, 1), (1, 1), (2, 1)])
        return self.conv(n, m, rhs_dilation=dilation)

    def depthwise(self, n: int) -> tuple[Layer, int]:
        many = self.chance.choice([1, 1, 2])
        return self.conv(n, n * many, n), n * many

    def grouped(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        return self.conv(n, m, 2), m

    def strided(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        return self.conv(n, m, window_strides=(2, 2)), m

    def transposed(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        padding = [(1, 1), (1, 1)]
        return self.conv(n, m, lhs_dilation=(2, 2), padding=padding), m

    def pooled(self, n: int) -> tuple[Layer, int]:
        kind, start = self.chance.choice([(jax.lax.max, -jnp.inf), (jax.lax.add, 0.0)])
        return (
            lambda p, x: jax.lax.reduce_window(
                x, start, kind, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"
            ),
            n,
        )

    def last(self, n: int, shape: tuple[int, ...]) -> Layer:
        """A classifier of all positions, or of their mean."""
        if self.chance.random() < 0.5:
            read = self.dense(int(np.prod(shape[1:])), 2)
            return lambda p, x: read(p, x.reshape(len(x), -1))
        read = self.dense(n, 2)
        return lambda p, x: read(p, x.mean((1, 2)))


class OfRows(Maker):
    """Layers of sequences [examples, positions, channels]."""

    KINDS = Maker.COMMON + " attention attention fused recurrent stacked"

    def attention(self, n: int) -> tuple[Layer, int]:
        """Two heads of keys, with one or two of queries each."""
        many, wide = self.chance.choice([1, 2]), 2
        q, k, v = (self.dense(n, 2 * m * wide) for m in (many, 1, 1))
        out = self.dense(2 * many * wide, n)

        def call(p, x):
            lead = x.shape[:2]
            a, b = (f(p, x).reshape(*lead, 2, wide) for f in (k, v))
            queries = q(p, x).reshape(*lead, 2, many, wide)
            mixed = jax.vmap(attended, (3, None, None), 3)(queries, a, b)
            return x + out(p, mixed.reshape(*lead, -1))

        return call, n

    def fused(self, n: int) -> tuple[Layer, int]:
        """Queries, keys and values in one tensor, head by head or one by one."""
        qkv, out = self.dense(n, 12), self.dense(4, n)
        axis = self.chance.choice([2, 3])
        parts = (3, 2, 2) if axis == 2 else (2, 3, 2)

        def call(p, x):
            all_ = jnp.moveaxis(qkv(p, x).reshape(*x.shape[:2], *parts), axis, 0)
            mixed = attended(all_[0], all_[1], all_[2])
            return x + out(p, mixed.reshape(*x.shape[:2], -1))

        return call, n

    def recurrent(self, n: int) -> tuple[Layer, int]:
        """Gates from the input and from the state."""
        m = self.width()
        into, own = self.dense(n, 2 * m), self.dense(m, 2 * m)

        def call(p, x):
            def step(h, row):
                new, gate = jnp.split(row + own(p, h), 2, axis=-1)
                gate = jax.nn.sigmoid(gate)
                h = gate * h + (1 - gate) * jnp.tanh(new)
                return h, h

            rows = jnp.moveaxis(into(p, x), 1, 0)
            hs = jax.lax.scan(step, jnp.zeros((len(x), m)), rows)[1]
            return jnp.moveaxis(hs, 0, 1)

        return call, m

    def stacked(self, n: int) -> tuple[Layer, int]:
        m = self.width()
        up, down = self.new(2, n, m), self.new(2, m, n)

        def call(p, x):
            def step(h, own):
                return h + jnp.tanh(h @ own[0]) @ own[1], None

            return jax.lax.scan(step, x, (p[up], p[down]))[0]

        return call, n

    def last(self, n: int, shape: tuple[int, ...]) -> Layer:
        """A classifier of each position."""
        return self.dense(n, 2)


def network(chance: random.Random) -> tuple[dict, Layer, jax.Array, list[str]]:
    """A network by chance: parameters, function, two examples and kinds of layers."""
    maker = chance.choice([OfImages, OfRows])(chance)
    shape = (2, 4, 4, 3) if isinstance(maker, OfImages) else (2, 5, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    first = maker.mixed(3, n := maker.width())
    layers = [first]
    for _ in range(chance.randint(1, 4)):
        layer, n = maker.step(n)
        layers.append(layer)

    def body(p, x):
        for layer in layers:
            x = layer(p, x)
        return x

    after = jax.eval_shape(body, maker.params, x).shape
    last = maker.last(n, after)
    return maker.params, lambda p, x: last(p, body(p, x)), x, maker.said
