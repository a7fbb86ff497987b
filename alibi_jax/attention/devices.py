"""Attention on many devices: each does its own batch entries, heads and queries.

Only keys are ever communicated, and only where sequences are divided over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from alibi_jax.attention.biases import Bias, PrefixBias
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
    is not: it must see the shapes of one device. Where no mesh is set, or none of its axes is
    explicit, this is a plain call, and the caller decides, for example with `jax.shard_map`.

    Where lengths are sharded over a mesh axis, `attend` also gets `axis`, its name.

    Raises:
      ValueError: a sharding that it cannot do: of head dims, of lengths over several mesh axes or
        not alike, or of query heads but not of more than one key head.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.explicit_axes:
        return attend(query, key, value, bias, scale=scale, **tokens)
    if not mesh.are_all_axes_explicit:
        raise ValueError(
            f"the axes of the mesh must be all explicit or none, got {mesh}; "
            'implementation="dense" takes any mesh'
        )

    of_query, of_key, of_value = (_axes(x) for x in (query, key, value))
    for name, x, axes in (("query", query, of_query), ("key", key, of_key)):
        if len(axes[1]) > 1 or axes[3]:
            raise ValueError(
                f"{name} is sharded as {_spec(x)}: only batch, length and heads (axes 0 to 2) may "
                'be, and length over one mesh axis; implementation="dense" takes any sharding of '
                "batch, heads and head dim"
            )
    if not of_query[:2] == of_key[:2] == of_value[:2] or of_key[2] != of_value[2] or of_value[3]:
        raise ValueError(
            "query, key and value must be sharded alike along batch, length and heads (axes 0 to "
            f"2), got {_spec(query)}, {_spec(key)} and {_spec(value)}"
        )
    if of_key[2] != of_query[2] and (of_key[2] or key.shape[2] > 1):
        raise ValueError(
            f"query heads are sharded over {of_query[2]} and the {key.shape[2]} key heads over "
            f"{of_key[2]}: they must be sharded alike, or there must be one key head"
        )
    batch, length, heads, _ = _spec(query)
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
    specs = (_spec(query), _spec(key), _spec(value), jax.tree.map(lambda _: of_part, bias))
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


def length_is_sharded(query: Array) -> bool:
    """Return whether the queries of a sequence are divided over devices of an explicit mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.explicit_axes) and bool(_axes(query)[1])


def whole_length(x: Array) -> Array:
    """Return x [B, L, ...] with a length that JAX does not take for sharded over an axis of one."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes or _spec(x)[1] is None:
        return x
    batch, _, *rest = _spec(x)
    return jax.sharding.reshard(x, PartitionSpec(batch, None, *rest))


def _spec(x: Array) -> PartitionSpec:
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def _axes(x: Array) -> list[tuple[str, ...]]:
    """Return the mesh axes that divide each axis of x; those of size 1 do not count."""
    sizes = jax.typeof(x).sharding.mesh.shape
    names = (n if isinstance(n, tuple) else (n,) for n in _spec(x))
    return [tuple(n for n in group if n is not None and sizes[n] > 1) for group in names]
