"""Accelerators that are not there: what a compiler and a memory plan have to know.

The compilers for TPU and CUDA run on any machine: they take a description of a device
where no device is.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.stages import Lowered

from woodfisher_jax.extras import MissingExtraError

GIB = 2**30

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 {}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{}"
"""

_H100 = """
  core_count: 132 fpus_per_core: 128 cuda_compute_capability { major: 9 minor: 0 }
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  device_memory_size: 84978434048 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
"""
_A100 = """
  core_count: 108 fpus_per_core: 64 cuda_compute_capability { major: 8 minor: 0 }
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
  device_memory_size: 42331013120 memory_bandwidth: 1555200000000
  l2_cache_size: 41943040 clock_rate_ghz: 1.41
"""


class Kind(NamedTuple):
    """A kind of accelerator.

    Attributes:
        device_kind: What JAX calls it.
        memory: Of a device, bytes.
        host_memory: Of its host, a device, in Google Cloud's machines; bytes.
        options: Of its topology, for the compiler.
        compiler: Settings of the compiler.
    """

    device_kind: str
    memory: int
    host_memory: int
    options: dict[str, str] = {}  # noqa: RUF012 -- read only
    compiler: dict[str, Any] = {}  # noqa: RUF012 -- read only


# A chip of v4 and v5p has two cores, which a program sees as one device.
_ONE_A_CHIP = {"chip_config_name": "megacore"}

# Products by cuBLAS. Those by Triton are chosen by trying them on the device; without
# one the compiler takes tiles of sizes that some products cannot have, and gives up.
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}

# With more, one product of float32 takes seconds, and a step of ResNet-50 minutes.
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}

KINDS = {
    "tpu:v4": Kind("TPU v4", 32 * GIB, 100 * GIB, _ONE_A_CHIP, _LEAST_EFFORT),
    "tpu:v5e": Kind("TPU v5 lite", 16 * GIB, 48 * GIB, {}, _LEAST_EFFORT),
    "tpu:v5p": Kind("TPU v5", 95 * GIB, 110 * GIB, _ONE_A_CHIP, _LEAST_EFFORT),
    "tpu:v6e": Kind("TPU v6 lite", 32 * GIB, 180 * GIB, {}, _LEAST_EFFORT),
    "cuda:a100": Kind(
        "NVIDIA A100-SXM4-40GB", 40 * GIB, 85 * GIB, {"target_config": _A100}, _CUBLAS
    ),
    "cuda:h100": Kind(
        "NVIDIA H100 80GB HBM3", 80 * GIB, 230 * GIB, {"target_config": _H100}, _CUBLAS
    ),
}
"""By what comes before the shape in the name of a target."""

_COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}


class TargetError(ValueError):
    """There is no such target, or its devices cannot be arranged so."""


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
        name: As given, such as tpu:v5e:4x4.
        kind: Of each device.
        devices: All of them; programs for them can be compiled and not be run.
    """

    name: str
    kind: Kind
    devices: tuple[jax.Device, ...]


def parse(name: str) -> tuple[str, str, tuple[int, ...]]:
    """The compiler, the kind and the shape of a target's name.

    Args:
        name: ``tpu:KIND:AxB``, ``tpu:KIND:AxBxC``, ``cuda:KIND`` or ``cuda:KIND:N``.

    Returns:
        ("tpu", "tpu:v5e", (4, 4)); of one GPU the shape is (1,).

    Raises:
        TargetError: If it is none.
    """
    platform, _, rest = name.partition(":")
    kind, _, given = rest.partition(":")
    shape = "1" if platform == "cuda" and not given else given
    expected = r"[1-9]\d*" if platform == "cuda" else r"[1-9]\d*(x[1-9]\d*){1,2}"
    if f"{platform}:{kind}" not in KINDS or not re.fullmatch(expected, shape):
        raise TargetError(
            f"target={name!r}; expected a kind of {', '.join(KINDS)} and its shape, as "
            "in tpu:v5e:4x4, tpu:v4:2x2x2, cuda:h100 or cuda:h100:8 (on one host)"
        )
    return platform, f"{platform}:{kind}", tuple(map(int, shape.split("x")))


def target(name: str) -> Target:
    """The devices of a target, for compilation alone.

    Call it before anything else touches a device: it keeps JAX from looking for
    accelerators on this machine.

    Args:
        name: As for :func:`parse`.

    Raises:
        TargetError: If there is no such target.
        MissingExtraError: If its compiler is not installed.
    """
    platform, kind, shape = parse(name)
    compiler = _COMPILERS[platform]
    if importlib.util.find_spec(compiler) is None:
        raise MissingExtraError(
            f"the target {name} needs {compiler.replace('_', '-')}: "
            "pip install 'woodfisher-jax[targets]'"
        )
    jax.config.update("jax_platforms", "cpu")
    row = KINDS[kind]
    if platform == "tpu":
        # Else libtpu asks the network which machine this is.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-16"
        topology = name.removeprefix("tpu:")
        options = row.options
    else:
        topology = f"{kind.partition(':')[2]}:1x1x{shape[0]}"
        text = _GPU.format(row.options["target_config"], row.device_kind)
        options = {"topology": topology.partition(":")[2], "target_config": text}
    try:
        found = topologies.get_topology_desc(
            platform=platform, topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(
            f"target={name!r}: {str(error).partition(chr(10))[0]}; expected a shape "
            "that such machines come in, as 2x2 or 4x4"
        ) from error
    return Target(name, row, tuple(found.devices))


def kind_of(device: jax.Device) -> Kind | None:
    """The kind of a device that is not there; None for others."""
    if device in jax.devices():
        return None
    kinds = (kind for kind in KINDS.values() if kind.device_kind == device.device_kind)
    return next(kinds, None)


def compiled(lowered: Lowered, mesh: Mesh | None) -> Any:
    """Compiles a program for devices, whether they are there or not."""
    kind = kind_of(mesh.devices.flat[0]) if mesh else None
    return lowered.compile(kind.compiler if kind else None)
