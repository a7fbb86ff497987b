"""How arrays are placed on the devices of an explicit mesh."""

import jax
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def explicit_mesh(*arrays: Array) -> AbstractMesh | None:
    """Return the mesh that is set, or else that of the arrays, if it has an explicit axis."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def length_is_sharded(query: Array) -> bool:
    """Return whether the queries of a sequence are divided over devices of an explicit mesh."""
    return explicit_mesh(query) is not None and bool(axes_of(query)[1])


def whole_length(x: Array) -> Array:
    """Return x [B, L, ...] with a length that JAX does not take for sharded over an axis of one."""
    mesh = explicit_mesh(x)
    if mesh is None or spec_of(x)[1] is None:
        return x
    batch, _, *rest = spec_of(x)
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(batch, None, *rest)))


def spec_of(x: Array) -> PartitionSpec:
    """Return how x is sharded, with one entry for each axis."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def axes_of(x: Array) -> list[tuple[str, ...]]:
    """Return the mesh axes that divide each axis of x; those of size 1 do not count."""
    sizes = jax.typeof(x).sharding.mesh.shape
    names = (n if isinstance(n, tuple) else (n,) for n in spec_of(x))
    return [tuple(n for n in group if n is not None and sizes[n] > 1) for group in names]
