"""One mesh with named axes, and the one table that says what is sharded over what.

Every array is described by logical axes ("batch", "heads", ...); `RULES` maps those to mesh axes,
and `rules` to those of a mesh of your own. An axis that the mesh lacks shards nothing. Nor does one
that is not explicit: over "auto" axes XLA itself divides a program. Without a mesh (a notebook, a
test, one device) `spec` is None and nothing is sharded.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
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

# What `rules` sets: entries in the place of those of `RULES`. JAX compiles anew where it differs.
_own_rules = jax.make_user_context(default_value=())


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


def rules(**mesh_axes: str | tuple[str, ...] | None) -> AbstractContextManager[None]:
    """A context in which logical axes are sharded over mesh axes of other names than `RULES` has.

      mesh = jax.make_mesh((4, 2), ("dp", "tp"))
      with jax.set_mesh(mesh), rules(batch="dp", embed="dp", heads="tp", mlp="tp"):
          model = Decoder(config, nnx.Rngs(0))

    Args:
      **mesh_axes: of logical axes, mesh axes; None: not sharded. Those left out are as before.

    Raises:
      UserError: there is no such logical axis.
    """
    for axis in mesh_axes:
        require(axis in RULES, f"rules({axis}=...): the logical axes are {', '.join(RULES)}")
    return _own_rules(tuple((dict(_own_rules.value) | mesh_axes).items()))


def spec(*axes: str | None) -> PartitionSpec | None:
    """PartitionSpec of an array with these logical axes, or None where no mesh axis is explicit."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return None
    table = RULES | dict(_own_rules.value)

    def over(axis: str | None) -> str | tuple[str, ...] | None:
        names = table[axis] if axis else None
        if names is None or isinstance(names, str):
            return names if names in explicit else None
        return tuple(name for name in names if name in explicit) or None

    return PartitionSpec(*map(over, axes))


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or `ShapeDtypeStruct`s, without padding."""

    def local(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(local, jax.tree.leaves(tree)))


def replicate(x: jax.Array) -> jax.Array:
    """A copy of x on every device of the mesh; x itself where no mesh axis is explicit."""
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
