"""Attention on many devices: each does its own batch entries, heads and queries.

Only keys are ever communicated, and only where sequences are divided over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from alibi_jax.attention.biases import Bias, PrefixBias
from alibi_jax.attention.placement import axes_of, explicit_mesh, spec_of
from alibi_jax.typing import Attended


def per_device(
    attend: Callable[..., Attended],
    query: Array,
    key: Array,
    value: Array,
    bias: Bias | Array,
    *,
    scale: float | Array,
    **tokens: Any,
) -> Attended:
    """Call `attend(query, key, value, bias, scale=..., **tokens)` on each device's own part.

    `dense` is plain array code that the compiler divides by itself. A loop over tiles or a kernel
    is not: it must see the shapes of one device. Axes of the mesh that are not explicit are the
    caller's to decide on, for example with `jax.shard_map`; without others this is a plain call.

    Where lengths are sharded over a mesh axis, `attend` also gets `axis`, its name.

    Raises:
      ValueError: a sharding that it cannot do: of head dims, of lengths over several mesh axes or
        not alike, or of query heads but not of more than one key head.
    """
    mesh = explicit_mesh(query, key, value)
    if mesh is None:
        return attend(query, key, value, bias, scale=scale, **tokens)

    of_query, of_key, of_value = (axes_of(x) for x in (query, key, value))
    for name, x, axes in (("query", query, of_query), ("key", key, of_key)):
        if len(axes[1]) > 1 or axes[3]:
            raise ValueError(
                f"{name} is sharded as {spec_of(x)}: only batch, length and heads (axes 0 to 2) "
                'may be, and length over one mesh axis; implementation="dense" takes any sharding '
                "of batch, heads and head dim"
            )
    if not of_query[:2] == of_key[:2] == of_value[:2] or of_key[2] != of_value[2] or of_value[3]:
        raise ValueError(
            "query, key and value must be sharded alike along batch, length and heads (axes 0 to "
            f"2), got {spec_of(query)}, {spec_of(key)} and {spec_of(value)}"
        )
    if of_key[2] != of_query[2] and (of_key[2] or key.shape[2] > 1):
        raise ValueError(
            f"query heads are sharded over {of_query[2]} and the {key.shape[2]} key heads over "
            f"{of_key[2]}: they must be sharded alike, or there must be one key head"
        )
    batch, length, heads, _ = spec_of(query)
    if of_query[1]:
        (axis,) = of_query[1]
        attend = partial(attend, axis=axis)

    def of_tokens(x: Array) -> PartitionSpec:
        if x.ndim == 0:  # the window
            return PartitionSpec()
        # Positions that all batch entries share have one row, which every device keeps.
        return PartitionSpec(batch if x.shape[0] == query.shape[0] else None, length)

    # A bias has arrays of heads [H, ...], or of tokens [B, length, H].
    of_part = PartitionSpec(heads)
    if isinstance(bias, PrefixBias):
        of_part = PartitionSpec(batch, None, heads)
    inputs = (query, key, value, bias)
    specs = (spec_of(query), spec_of(key), spec_of(value), jax.tree.map(lambda _: of_part, bias))
    options = {name: x for name, x in tokens.items() if x is not None}
    option_specs = {name: of_tokens(x) for name, x in options.items()}
    fixed: dict[str, Any] = {name: None for name in tokens if name not in options}
    if isinstance(scale, Array):
        options["scale"], option_specs["scale"] = scale, PartitionSpec()
    else:
        fixed["scale"] = scale
    mapped = jax.shard_map(
        lambda inputs, options: attend(*inputs, **options, **fixed),
        mesh=mesh,
        axis_names=set(mesh.explicit_axes),
        in_specs=(specs, option_specs),
        out_specs=spec_of(query),
        check_vma=False,  # Pallas kernels do not say what varies
    )

    shardings = jax.tree.map(partial(NamedSharding, mesh), (specs, option_specs))
    return mapped(*jax.tree.map(jax.sharding.reshard, (inputs, options), shardings))
