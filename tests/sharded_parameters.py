"""Prunes parameters that are spread over eight devices; run by test_sharding.py.

    python sharded_parameters.py METHOD

Prints a line for each case in which the result is that of one device, with the
shardings of the arguments.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import woodfisher_jax as wf

X = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
PARAMS = {
    "first": np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32),
    "last": np.random.default_rng(2).standard_normal((8, 8)).astype(np.float32),
}
MESHES = {
    "one axis": ((8,), ("d",), PartitionSpec("d")),
    "two axes": ((4, 2), ("a", "b"), PartitionSpec("b", "a")),
}


def loss(params: Any, x: Any) -> jax.Array:
    """Of two layers."""
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["last"] - 1) ** 2)


def run(params: Any, **options: Any) -> Any:
    """Two steps, the second from the masks of the first."""
    for sparsity in (0.3, 0.6):
        params, masks, _ = wf.prune(loss, params, X, sparsity=sparsity, **options)
        options["masks"] = masks
    return params, masks


def main(method: str) -> None:
    """Every kind of axes and of mesh."""
    options: dict[str, Any] = {"method": method}
    if method == "woodfisherblock":
        options |= {"block_size": 50, "store": "host"}
    alone = run(jax.tree.map(jnp.asarray, PARAMS), **options)
    for name, (shape, axes, spec) in MESHES.items():
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
            sharding = NamedSharding(mesh, spec)
            params = jax.device_put(PARAMS, sharding)
            for compute in (None, mesh):
                found = run(params, mesh=compute, **options)
                assert {a.sharding for a in jax.tree.leaves(found)} == {sharding}
                assert not found[0]["first"].is_fully_replicated
                for path, mask in found[1].items():
                    np.testing.assert_array_equal(mask, alone[1][path])
                    np.testing.assert_allclose(
                        found[0][path], alone[0][path], atol=1e-5
                    )
                print(name, kind.name, compute is not None, flush=True)
            with jax.set_mesh(mesh):
                wf.plan_pruning(loss, params, X, sparsity=0.5, **options)
                inside = run(params, **options)
            jax.tree.map(np.testing.assert_array_equal, inside, found)
            assert {a.sharding for a in jax.tree.leaves(inside)} == {sharding}


if __name__ == "__main__":
    main(sys.argv[1])
