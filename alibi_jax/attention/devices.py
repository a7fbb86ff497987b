"""Attention on many devices: each does its own batch entries and heads, with no communication."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from alibi_jax.typing import Attended


def per_device(
    attend: Callable[..., Attended],
    query: Array,
    key: Array,
    value: Array,
    slopes: Array,
    *,
    scale: float | Array,
    **tokens: Any,
) -> Attended:
    """Call `attend(query, key, value, slopes, scale=..., **tokens)` on each device's own part.

    `dense` is plain array code that the compiler divides by itself. A loop over tiles or a kernel
    is not: it must see the shapes of one device. Where no mesh is set, or none of its axes is
    explicit, this is a plain call, and the caller decides, for example with `jax.shard_map`.

    Raises:
      ValueError: a sharding that needs communication: of lengths or head dims, or of query heads
        but not of more than one key head.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.explicit_axes:
        return attend(query, key, value, slopes, scale=scale, **tokens)
    if not mesh.are_all_axes_explicit:
        raise ValueError(
            f"the axes of the mesh must be all explicit or none, got {mesh}; "
            'implementation="dense" takes any mesh'
        )

    of_query, of_key, of_value = (_axes(x) for x in (query, key, value))
    for name, x, axes in (("query", query, of_query), ("key", key, of_key)):
        if axes[1] or axes[3]:
            raise ValueError(
                f"{name} is sharded as {_spec(x)}: only batch and heads (axes 0 and 2) may be; "
                'implementation="dense" takes any sharding'
            )
    if not of_query[0] == of_key[0] == of_value[0] or of_key[1:3] != of_value[1:3] or of_value[3]:
        raise ValueError(
            "query, key and value must be sharded alike along batch and heads (axes 0 and 2), got "
            f"{_spec(query)}, {_spec(key)} and {_spec(value)}"
        )
    if of_key[2] != of_query[2] and (of_key[2] or key.shape[2] > 1):
        raise ValueError(
            f"query heads are sharded over {of_query[2]} and the {key.shape[2]} key heads over "
            f"{of_key[2]}: they must be sharded alike, or there must be one key head"
        )
    batch, heads = _spec(query)[0], _spec(query)[2]

    def of_tokens(x: Array) -> PartitionSpec:
        # Positions that all batch entries share have one row, which every device keeps.
        return PartitionSpec(batch if x.shape[0] == query.shape[0] else None)

    inputs = (query, key, value, slopes)
    specs = (_spec(query), _spec(key), _spec(value), PartitionSpec(heads))
    options = {name: x for name, x in tokens.items() if x is not None}
    option_specs = {name: of_tokens(x) for name, x in options.items()}
    fixed: dict[str, Any] = {name: None for name in tokens if name not in options}
    if isinstance(scale, Array):
        options["scale"], option_specs["scale"] = scale, PartitionSpec()
    else:
        fixed["scale"] = scale
    placed = jax.tree.map(jax.sharding.reshard, (inputs, options), (specs, option_specs))
    mapped = jax.shard_map(
        lambda inputs, options: attend(*inputs, **options, **fixed),
        in_specs=(specs, option_specs),
        out_specs=_spec(query),
        check_vma=False,  # Pallas kernels do not say what varies
    )
    # jit, since op by op JAX has no shard_map of a custom_vjp that asks what is differentiated.
    return jax.jit(mapped)(*placed)


def _spec(x: Array) -> PartitionSpec:
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def _axes(x: Array) -> list[tuple[str, ...]]:
    """Return the mesh axes that divide each axis of x; those of size 1 do not count."""
    sizes = jax.typeof(x).sharding.mesh.shape
    names = (n if isinstance(n, tuple) else (n,) for n in _spec(x))
    return [tuple(n for n in group if n is not None and sizes[n] > 1) for group in names]
