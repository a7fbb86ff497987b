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
    is not: it must see the shapes of one device. Where no mesh with explicit axes is set, this is a
    plain call, and the caller decides, for example with `jax.shard_map`.

    Raises:
      ValueError: a sharding that needs communication: of lengths or head dims, or of query heads
        but not of more than one key head.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return attend(query, key, value, slopes, scale=scale, **tokens)

    of_query, of_key, of_value = (_spec(x) for x in (query, key, value))
    for name, spec in (("query", of_query), ("key", of_key), ("value", of_value)):
        if spec[1] is not None or spec[3] is not None:
            raise ValueError(
                f"{name} is sharded as {spec}: only batch and heads (axes 0 and 2) may be; "
                'implementation="dense" takes any sharding'
            )
    batch, heads = of_query[0], of_query[2]
    if (of_key[0], of_value[0]) != (batch, batch) or of_key[2] != of_value[2]:
        raise ValueError(
            "query, key and value must be sharded alike along batch and heads (axes 0 and 2), got "
            f"{of_query}, {of_key} and {of_value}"
        )
    if of_key[2] != heads and not (of_key[2] is None and key.shape[2] == 1):
        raise ValueError(
            f"query heads are sharded over {heads} and the {key.shape[2]} key heads over "
            f"{of_key[2]}: they must be sharded alike, or there must be one key head"
        )

    def of_tokens(x: Array) -> PartitionSpec:
        # Positions that all batch entries share have one row, which every device keeps.
        return PartitionSpec(batch if x.shape[0] == query.shape[0] else None)

    inputs = (query, key, value, slopes)
    specs = (of_query, of_key, of_value, PartitionSpec(heads))
    options = {name: x for name, x in tokens.items() if x is not None}
    option_specs = {name: of_tokens(x) for name, x in options.items()}
    fixed: dict[str, Any] = {name: None for name in tokens if name not in options}
    if isinstance(scale, Array):
        options["scale"], option_specs["scale"] = scale, PartitionSpec()
    else:
        fixed["scale"] = scale
    placed = jax.tree.map(jax.sharding.reshard, (inputs, options), (specs, option_specs))
    return jax.shard_map(
        lambda inputs, options: attend(*inputs, **options, **fixed),
        in_specs=(specs, option_specs),
        out_specs=of_query,
        # The loops over tiles start from zeros that are the same everywhere, which the check of
        # varying axes would refuse.
        check_vma=False,
    )(*placed)


def _spec(x: Array) -> PartitionSpec:
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))
