"""Which process this is; what several do together is in test_multiprocess.py."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax._src import distributed as jax_distributed

from alibi_jax import distributed
from alibi_jax.errors import UserError
from alibi_jax.sharding import MeshConfig, local_rows, make_mesh, spec, to_devices, to_host

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)  # must not be called
    distributed.initialize({})
    assert distributed.is_main() and distributed.from_main(lambda: 3) == 3
    assert distributed.main_first(lambda: "value") == "value"
    assert distributed.any_process(True) and not distributed.any_process(False)
    distributed.wait_for_all()
    distributed.finish()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_is_quiet_without_a_tpu():
    program = "from alibi_jax import distributed; distributed.initialize({}); import jax; "
    program += "print(jax.devices()[0].platform)"
    unset = ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # another test may have loaded it
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "cpu":
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        (SLURM, True),
        ({"SLURM_JOB_ID": "7"}, False),  # in a job, but not started by srun
        ({"JAX_COORDINATOR_ADDRESS": "localhost:8476"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}, True),
    ],
)
def test_clusters(monkeypatch, environment, found):
    """JAX's own detection decides; in a cluster, flags may give a part of what it finds."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if environment.keys() & {"OMPI_MCA_orte_hnp_uri"} and jax.__version_info__ >= (0, 11):
        pytest.skip("this JAX detects Open MPI through mpi4py")
    assert distributed._in_cluster() == found
    if found:
        assert distributed._parse({"process_id": "1"}) == {"process_id": 1}
    else:
        with pytest.raises(UserError, match=r"coordinator_address, .*num_processes missing"):
            distributed._parse({"process_id": "1"})


def test_taken_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        flags = {
            "coordinator_address": f"localhost:{taken.getsockname()[1]}",
            "num_processes": "2",
            "process_id": "0",
        }
        with pytest.raises(UserError, match=r"the port cannot be used .*in use.*choose another"):
            distributed.initialize(flags)


@pytest.mark.parametrize(
    ("there", "works", "ends"),
    [
        ({}, True, (2, "ours")),
        ({}, False, (2, "ours")),  # the service is gone
        ({"alibi_jax/failure/first": "1 0"}, True, (1, "")),
        ({"alibi_jax/failure/first": "2 3"}, False, (2, "ours")),  # set, though it seemed to fail
    ],
)
def test_one_process_of_all_says_why(monkeypatch, there, works, ends):
    class Client:
        def key_value_set(self, key, value):
            if key in there or not works:
                raise jax.errors.JaxRuntimeError("refused")
            there[key] = value

        def key_value_try_get(self, key):
            if key not in there:
                raise jax.errors.JaxRuntimeError("gone")
            return there[key]

    left = []
    monkeypatch.setattr(distributed, "_client", Client)
    monkeypatch.setattr(distributed, "_ending", threading.Lock())
    monkeypatch.setattr(distributed, "_leave", lambda *arguments: left.append(arguments))
    monkeypatch.setattr(jax_distributed.global_state, "process_id", 3)
    distributed.end(2, "ours")
    assert left == [ends]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_to_devices_and_back(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    x = np.arange(16 * 3).reshape(16, 3)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, spec("batch", None))
        rows = local_rows(sharding, x.shape)
        np.testing.assert_array_equal(rows, np.arange(16))  # one process holds all of them
        placed = to_devices({"x": x[rows]}, sharding, 16)["x"]
        assert placed.sharding == sharding
        np.testing.assert_array_equal(to_host(placed), x)


def test_rows_of_one_process_of_several():
    """Its blocks in order, and a block that several of its devices hold once."""

    class Sharding:
        def addressable_devices_indices_map(self, shape):
            blocks = [slice(6, 8), slice(2, 4), slice(2, 4)]
            return {device: (block, slice(None)) for device, block in enumerate(blocks)}

    assert local_rows(Sharding(), (8, 3)).tolist() == [2, 3, 6, 7]
