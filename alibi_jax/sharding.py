"""One mesh with named axes, and the one table that says what is sharded over what.

Every array is described by logical axes ("batch", "heads", ...); `RULES` maps those to mesh axes.
Without a mesh (a notebook, a test, one device) `spec` is None and nothing is sharded.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alibi_jax import fields
from alibi_jax.errors import require

# Neighbours along the last are closest to each other, and context sends most.
MESH_AXES = ("data", "fsdp", "tensor", "context")

# logical axis -> mesh axes. Anything else is replicated.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # activations: sequences
    "length": "context",  # activations: positions in a sequence
    "embed": "fsdp",  # parameters: the model dimension, gathered where it is used
    "heads": "tensor",  # parameters and activations: query and key/value heads
    "mlp": "tensor",  # parameters and activations: the hidden layer of the MLP
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. At most one may be -1."""

    data: int = -1  # copies of the model, each with its share of the batch; -1: all other devices
    fsdp: int = 1  # shards of parameters and optimizer state, each with its share of the batch
    tensor: int = 1  # shards of heads and of the MLP's hidden layer
    context: int = 1  # shards of every sequence, so that each device has some of its positions

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Sizes in the order of `MESH_AXES`, with -1 filled; raises UserError if impossible."""
        fields.check(self, "config.mesh")
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        given = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        require(
            all(size == -1 or size >= 1 for size in sizes) and sizes.count(-1) <= 1,
            f"config.mesh has {given}: each size must be at least 1, and at most one may be -1",
        )
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            sizes[sizes.index(-1)] = num_devices // known
        require(
            math.prod(sizes) == num_devices,
            f"config.mesh has {given}, which does not fill {num_devices} device(s): the product of "
            "the sizes must equal the number of devices",
        )
        return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the devices, by default all, with explicit axis types.

    Raises:
      UserError: the sizes do not fill the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # An axis may take a part of a dimension of the slice, as 4 × 16 of 8 × 8 chips has to, which
    # `jax.make_mesh` allows on some chips only.
    placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def spec(*axes: str | None) -> PartitionSpec | None:
    """PartitionSpec of an array with these logical axes, or None when no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or `ShapeDtypeStruct`s, without padding."""

    def local(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(local, jax.tree.leaves(tree)))


def replicate(x: jax.Array) -> jax.Array:
    """A copy of x on every device of the mesh; x itself when no mesh is set."""
    replicated = spec(*(None,) * x.ndim)
    return x if replicated is None else jax.sharding.reshard(x, replicated)


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of a global array that the devices of this process hold, ascending int[n].

    Args:
      sharding: of the array; its other axes may hold copies, so that processes share rows.
      shape: of the array, rows first.
    """
    indices = sharding.addressable_devices_indices_map(shape).values()
    blocks = {index[0].indices(shape[0]) for index in indices if index is not None}
    return np.concatenate([np.arange(*block) for block in sorted(blocks)])


def to_devices(local: Any, sharding: NamedSharding, num_rows: int) -> Any:
    """Global arrays of `num_rows` rows, from those rows of them that `local_rows` gives.

    Args:
      local: a tree of NumPy arrays [n, ...].
      sharding: of the arrays.
      num_rows: of the global arrays.
    """

    def place(x: np.ndarray) -> jax.Array:
        shape = (num_rows, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, local)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
