"""Chips that are not here, to compile for."""

import importlib.util

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

CHIPS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


@pytest.fixture
def chip_mesh(monkeypatch):
    """Return an explicit mesh of a shape, of chips that are not here."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu to compile for TPUs: pip install '.[tpu]'")
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu guards the chips, and there are none
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        monkeypatch.setenv(name, value)

    def make(chip, shape, axes=("data", "tensor")):
        devices = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices
        grid = np.asarray(devices[: np.prod(shape)]).reshape(shape)
        return Mesh(grid, axes, axis_types=(AxisType.Explicit,) * len(axes))

    return make
