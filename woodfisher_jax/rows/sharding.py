"""Several devices: samples spread over them for gradients, blocks for curvature.

A mesh has one axis here, over all devices. Parameters, masks and scores, which both
need, are replicated. Gradients never are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "devices"


def one_axis(mesh: Mesh | None) -> Mesh | None:
    """The same devices in one row; None for a single device without a mesh."""
    if mesh is None:
        return None
    return Mesh(mesh.devices.reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))


def mesh_of(tree: Any) -> Mesh | None:
    """The devices that a tree is spread over; None if no array is spread."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
            mesh = sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None


def auto_axes(tree: Any) -> Any:
    """The same arrays on the same devices, with axes that the compiler may reshard.

    With Explicit axes the shardings are part of the types, and few formulas of a step
    say which of them their results have.
    """

    def auto(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return leaf
        mesh = sharding.mesh
        if AxisType.Explicit not in mesh.axis_types or not isinstance(mesh, Mesh):
            return leaf
        types = (AxisType.Auto,) * len(mesh.axis_names)
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(auto, tree)


@contextmanager
def outside_mesh() -> Iterator[None]:
    """Leaves the mesh of ``jax.set_mesh``, to which the arrays of a step do not belong.

    While JAX traces it does nothing, since a mesh cannot be left there.
    """
    empty = jax.sharding.get_abstract_mesh().empty
    if empty or isinstance(jax.device_put(0.0), jax.core.Tracer):
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield


def placed_as(array: Any, other: Any) -> Any:
    """An array with the sharding of another that is on several devices."""
    sharding = getattr(other, "sharding", None)
    if sharding is None or sharding.num_devices == 1 or array.sharding == sharding:
        return array
    return jax.device_put(array, sharding)


def num_devices(mesh: Mesh | None) -> int:
    """How many devices share the work."""
    return 1 if mesh is None else mesh.size


def platform_of(mesh: Mesh | None) -> str:
    """Where the work is done: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def local_devices(mesh: Mesh | None) -> list[jax.Device]:
    """This process's devices of the mesh, in its order; empty without a mesh."""
    here = jax.process_index()
    return [d for d in mesh.devices.flat if d.process_index == here] if mesh else []


def gathered(value: int) -> np.ndarray:
    """A whole number of each process [processes]."""
    if jax.process_count() == 1:
        return np.asarray([value])
    return np.asarray(multihost_utils.process_allgather(np.int32(value)))


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether every process has devices of the mesh, and there are several."""
    number = jax.process_count()
    if mesh is None or number == 1:
        return False
    return len({device.process_index for device in mesh.devices.flat}) == number


def placed(mesh: Mesh | None, *spec: str | None) -> NamedSharding | None:
    """The sharding of an array over the mesh, or None without one."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))


def held(array: jax.Array, mesh: Mesh | None, *spec: str | None) -> jax.Array:
    """Inside jit: constrains an array's sharding; without a mesh, does nothing."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, placed(mesh, *spec))


def on_each_device(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Runs a function on every device's own share of the arguments.

    The devices run one and the same program on shares of one shape, so that a result
    does not depend on how many there are.

    Args:
        function: Of local arrays.
        mesh: The devices; None calls the function as it is.
        in_specs: Partition specs of the arguments.
        out_specs: Partition specs of the results.
    """
    if mesh is None:
        return function
    # With check_vma, jax.grad of replicated parameters sums over devices by itself,
    # and per-sample gradients come back wrong without an error.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a copy of every array on each device; without a mesh, does nothing."""
    return tree if mesh is None else jax.device_put(tree, placed(mesh))


def shard_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Spreads NumPy arrays, the same in every process, over devices by leading axis."""
    rows = placed(mesh, AXIS)
    if rows is None:
        return tree

    def spread(array: Any) -> jax.Array:
        if not isinstance(array, np.ndarray):
            return jax.device_put(array, rows)  # typed random keys
        return jax.make_array_from_callback(
            np.shape(array), rows, lambda index: array[index]
        )

    return jax.tree.map(spread, tree)
