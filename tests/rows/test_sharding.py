"""One device, eight, and two processes of two prune alike.

Devices are simulated on the CPU. The same cases run in a process of their own each, see
many_devices.py; what they save is compared here.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from many_devices import NETWORKS, OTHERS

from woodfisher_jax.rows.sharding import (
    AXIS,
    held,
    local_devices,
    num_devices,
    on_each_device,
    one_axis,
    placed,
    replicate,
    shard_rows,
)

HERE = Path(__file__).parents[1]
QUICK = ("disk",)
"""Networks pruned along with the cases that are no networks; all take minutes, and are
slow."""
RARE = ("gradients of means", "swaps of few", "one sample", "two blocks")
"""Cases that go with the other networks."""
TOLERANCES = {"figures": 1e-4}
"""Where it is not 1e-6: sums over all weights, which devices add up in their order."""
SPREADS = ("eight devices", "two processes")


def start(folder: Path, name: str, devices: int, *args: str) -> subprocess.Popen:
    (folder / "gradients").mkdir(exist_ok=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(HERE.parent),
        "TMPDIR": str(folder / "gradients"),
    }
    command = [sys.executable, str(HERE / "many_devices.py"), str(folder / name), *args]
    return subprocess.Popen(command, env=environment)


def finish(children: list[subprocess.Popen]) -> None:
    try:
        for child in children:
            assert child.wait(timeout=600) == 0
    finally:
        for child in children:
            child.kill()
            child.wait()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def outcomes(folder: Path, cases: list[str]) -> dict[str, list[dict]]:
    """What every process of every spread has found."""
    names = ",".join(cases)
    finish([start(folder, "1.npz", 1, "1", names)])
    finish([start(folder, "8.npz", 8, "8", names)])
    port = free_port()
    finish(
        [
            start(folder, f"2-{rank}.npz", 2, "4", names, port, str(rank), "2")
            for rank in range(2)
        ]
    )

    def load(name: str) -> dict:
        with np.load(folder / name) as saved:
            return dict(saved)

    # No gradients are left on disk.
    assert not list((folder / "gradients").glob("woodfisher*"))
    return {
        "one device": [load("1.npz")],
        "eight devices": [load("8.npz")],
        "two processes": [load("2-0.npz"), load("2-1.npz")],
    }


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory):
    return outcomes(
        tmp_path_factory.mktemp("quick"),
        [*QUICK, *(case for case in OTHERS if case not in RARE)],
    )


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory):
    rest = [case for case in NETWORKS if case not in QUICK]
    return outcomes(tmp_path_factory.mktemp("slow"), [*rest, *RARE])


def of_case(found: dict, case: str) -> dict[str, np.ndarray]:
    return {
        name.partition("/")[2]: array
        for name, array in found.items()
        if name.partition("/")[0] == case
    }


def assert_alike(outcomes: dict, case: str) -> None:
    """Masks identical, weights to 1e-6 of the largest."""
    expected = of_case(outcomes["one device"][0], case)
    assert expected
    for spread in SPREADS:
        for found in outcomes[spread]:
            got = of_case(found, case)
            assert got.keys() == expected.keys()
            for name, array in expected.items():
                if array.dtype.kind == "f":
                    worst = abs(got[name] - array).max()
                    allowed = TOLERANCES.get(name, 1e-6) * abs(array).max()
                    assert worst <= allowed, (spread, name, worst, allowed)
                else:
                    np.testing.assert_array_equal(got[name], array, (spread, name))


@pytest.mark.slow
def test_as_many_devices_as_claimed(quick) -> None:
    expected = {"one device": 1, "eight devices": 8, "two processes": 4}
    for spread, number in expected.items():
        assert [int(found["devices"]) for found in quick[spread]] == [
            number for _ in quick[spread]
        ]


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
def test_masks_and_weights_do_not_depend_on_the_devices(quick, case) -> None:
    assert_alike(quick, case)
    one = of_case(quick["one device"][0], case)
    kept = sum(int(one[name].sum()) for name in one if name.endswith("mask"))
    assert kept == one["nonzero"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in NETWORKS if case not in QUICK])
def test_nor_with_any_other_method_or_store(slow, case) -> None:
    assert_alike(slow, case)


@pytest.mark.slow
def test_gradients_of_single_samples_are_the_same_on_every_mesh(quick) -> None:
    # Summed over devices they would still look like gradients.
    assert_alike(quick, "gradients")
    one = of_case(quick["one device"][0], "gradients")
    assert {len(array) for array in one.values()} == {83}


@pytest.mark.slow
def test_gradients_of_means_are_the_same_on_every_mesh(slow) -> None:
    assert_alike(slow, "gradients of means")
    one = of_case(slow["one device"][0], "gradients of means")
    assert {len(array) for array in one.values()} == {27}


@pytest.mark.slow
def test_an_ill_conditioned_block_is_the_same_wherever_it_lies(quick) -> None:
    assert_alike(quick, "ill conditioned")


@pytest.mark.slow
def test_the_tensor_that_cannot_be_inverted_is_named_on_every_mesh(quick) -> None:
    for found in (found for spread in quick.values() for found in spread):
        message = str(of_case(found, "refused")["message"])
        assert message.startswith("'b', is too ill conditioned")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one sample", "two blocks"])
def test_more_devices_than_samples_or_blocks(slow, case) -> None:
    assert_alike(slow, case)


# ------------------------------------------------------------------- in this process


def mesh_of_one() -> Mesh:
    mesh = one_axis(Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("x", "y")))
    assert mesh is not None
    return mesh


@pytest.mark.parametrize(
    "method", ["magni", pytest.param("woodfisherblock", marks=pytest.mark.slow)]
)
def test_parameters_that_are_spread_stay_so_and_are_pruned_alike(
    method: str,
) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(HERE.parent),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded_parameters.py"), method],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{mesh} {kind} {compute}"
        for mesh in ("one axis", "two axes")
        for kind in ("Auto", "Explicit")
        for compute in (False, True)
    ]


UNEQUAL = """
import sys
import jax, jax.numpy as jnp, numpy as np
import woodfisher_jax as wf
port, rank = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("x",))
few, many = np.ones((3 + int(rank), 2)), np.ones((9, 2))

def message(samples, **options):
    options = {"sparsity": 0.5, "mesh": mesh, "prunable": "w"} | options
    loss = lambda params, x: jnp.mean(x @ params["w"])
    try:
        wf.prune(loss, {"w": np.arange(2.0, dtype=np.float32)}, samples, **options)
    except ValueError as error:
        return str(error)

print(message(few))
print(message(iter([few])))
print(message(few, num_samples=4))
print(message(many, method="woodtaylor", mean_samples=few))
"""


@pytest.mark.slow
def test_processes_with_different_numbers_of_samples_all_say_so() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", UNEQUAL, port, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    said = [[x for x in out.splitlines() if "[Gloo]" not in x] for out in outputs]
    differ = "found gradients for 3 in process 0, 4 in process 1."
    for lines in said:
        assert len(lines) == 4
        for line in (0, 1, 3):
            assert differ in lines[line]
        assert lines[0].startswith(
            "samples: expected the same samples in every process"
        )
        assert lines[3].startswith("mean_samples: ")
    assert said[0][2].startswith("samples hold 3 examples, but num_samples=4")
    assert "for none in process 0, 4 in process 1." in said[1][2]


def test_without_a_mesh_nothing_is_spread() -> None:
    assert one_axis(None) is None
    assert num_devices(None) == 1
    assert local_devices(None) == []
    assert placed(None, AXIS) is None
    tree = {"a": np.arange(3)}
    assert replicate(tree, None) is tree
    assert shard_rows(tree, None) is tree
    array = jnp.arange(3)
    assert held(array, None, AXIS) is array
    assert on_each_device(len, None, None, None) is len


def test_a_mesh_of_any_shape_becomes_one_axis() -> None:
    mesh = mesh_of_one()
    assert mesh.axis_names == (AXIS,)
    assert mesh.devices.shape == (1,)
    assert one_axis(mesh) == mesh
    assert num_devices(mesh) == 1
    assert local_devices(mesh) == jax.devices()[:1]


def test_arrays_are_put_where_asked() -> None:
    mesh = mesh_of_one()
    rows = shard_rows({"a": np.arange(6.0, dtype=np.float32).reshape(3, 2)}, mesh)["a"]
    np.testing.assert_array_equal(rows, np.arange(6.0).reshape(3, 2))
    assert rows.sharding == placed(mesh, AXIS)
    whole = replicate({"a": np.arange(3)}, mesh)["a"]
    assert whole.sharding.is_fully_replicated


def test_gradients_of_shared_parameters_are_each_device_s_own() -> None:
    mesh = mesh_of_one()
    everywhere, rows = PartitionSpec(), PartitionSpec(AXIS)

    def local(weight, given):
        return jax.vmap(jax.grad(lambda w, x: jnp.sum(w * x)), (None, 0))(weight, given)

    spread = on_each_device(local, mesh, (everywhere, rows), rows)
    given = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(spread(jnp.ones(2), given), given)
