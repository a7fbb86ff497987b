"""Attention over sequences that are divided over devices: chunks of keys go round a ring.

Each device keeps its chunk of queries, and the chunks of keys and values come by, from one device
further at each hop (Liu et al., arXiv:2310.01889). What they contribute to a row is combined by
the row's `Stats`. In the backward pass the gradients of a chunk travel with it, and then home.

With the decay, few devices are within reach of a row. `alibi_jax.attention.tiles` makes the table
of the whole sequence, which says for each key head how many hops bring every chunk to all who need
it, and there its ring stops: a steep head sends its keys to the next device or to none. What is
left out is what one device would leave out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Int

from alibi_jax.attention.derivatives import reverse_once
from alibi_jax.attention.tiles import Plan, Stats, Tokens


class Passes(NamedTuple):
    """How an implementation computes, of each row, what ranges of key tiles contribute.

    Attributes:
      forward: `(plan, query, key, value, bias, scale, tokens, ranges)` to the output, in the
        dtype of `scale`, and the `Stats` of its rows.
      backward: `(plan, (query, ..., ranges), output, stats, cotangent, of_bias=...)`, with the
        output and `Stats` over all keys, to the gradients of query, in its dtype, and of key,
        value, bias and scale, in the dtype of scale. Where `of_bias` is false nobody reads that of
        the bias.

    A bias is a pytree with leaves [H, ...]: an array of slopes, or a `LinearBias` without a sink or
    `DistanceBias` of `alibi_jax.attention.biases`.
    """

    forward: Callable[..., tuple[Array, Stats]]
    backward: Callable[..., tuple[Array, ...]]


class Chunk(NamedTuple):
    """What goes round: the keys of one device, of one key head."""

    key: Array  # [B, S, 1, D]
    value: Array  # [B, S, 1, Dv]
    positions: Array  # [1 or B, S]
    segment_ids: Array | None  # [B, S]


def hops(
    ranges: tuple[Array, Array],
    device: Int[Array, ""],
    *,
    causal: bool,
    devices: int,
    key_tiles: int,
) -> tuple[Int[Array, ""], ...]:
    """Return, for each ring, how many hops bring to one device all chunks that its queries need.

    Args:
      ranges: what `key_ranges` returns on the device, or some heads of it.
      device: which of the ring it is.
      causal: whether keys after the query are hidden: then there is one ring, or else two.
      devices: how many there are in a ring.
      key_tiles: tiles in the chunk of a device.
    """
    first, end = (x[None] for x in ranges)
    counts = []
    for step, most in _rings(causal, devices):
        hop = jnp.arange(most + 1, dtype=jnp.int32)
        low = key_tiles * ((device - step * hop) % devices).reshape(-1, *(1,) * (first.ndim - 1))
        needed = (first < low + key_tiles) & (low < end) & (first < end)
        needed = needed.any(axis=tuple(range(1, needed.ndim)))
        counts.append(jnp.max(jnp.where(needed, hop, 0)))
    return tuple(counts)


def _rings(causal: bool, devices: int) -> tuple[tuple[int, int], ...]:
    """Return the step of a hop and the most hops of each ring; with these it reaches all devices.

    Causal rows need what is to their left, so their ring runs to the right. Others have two, to
    both sides, of half the hops.
    """
    if causal:
        return ((1, devices - 1),)
    return ((1, devices // 2), (-1, (devices - 1) // 2))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring_attention(axis, passes, plan, query, key, value, bias, scale, tokens, ranges):
    """Return attention [B, T, H, Dv] of this device's queries to the keys of all devices.

    Args:
      axis: the mesh axis of the surrounding `jax.shard_map` that sequences are divided over.
      passes: how to compute: the `Passes` of an implementation.
      plan: the `Plan` for one device.
      query: floating [B, T, H, D], of this device and of whole tiles, as all the others are.
      key: floating [B, S, K, D].
      value: floating [B, S, K, Dv].
      bias: a pytree of arrays [H, ...], of the dtype to compute in.
      scale: a scalar array of that dtype.
      tokens: the `Tokens` of this device.
      ranges: what `key_ranges` returns, of key tiles that are numbered through all devices.
    """
    output, *_ = _forward(axis, passes, plan, query, key, value, bias, scale, tokens, ranges)
    return _merge(output).astype(query.dtype)


def _forward(axis, passes, plan, query, key, value, bias, scale, tokens, ranges):
    """Return the output [K, B, T, G, Dv], `Stats` [K, B, G, T] and hops [K] a ring."""
    counts = _hops_of_all(axis, plan, ranges, key.shape[2])

    def one_head(k, counts):
        q, b, table, chunk = _of_head(k, query, key, value, bias, scale, tokens, ranges)

        def visit(chunk, table, state, luggage):
            seen = _tokens(tokens, chunk)
            part = passes.forward(plan, q, chunk.key, chunk.value, b, scale, seen, table)
            return _combine(state, part), luggage

        batch, length, group, _ = q.shape
        output = jnp.zeros((batch, length, group, value.shape[3]), q.dtype)
        ones = jnp.ones((batch, group, length), q.dtype)
        state = output, Stats(jnp.inf * ones, ones)
        return _go_round(axis, plan, counts, table, chunk, visit, state, ())[0]

    output, stats = jax.lax.map(lambda at: one_head(*at), (_heads(key), counts))
    return output, stats, counts


def _ring_forward(axis, passes, plan, *inputs):
    inputs, of_bias = without_marks(inputs)
    output, stats, counts = _forward(axis, passes, plan, *inputs)
    # A tuple or None, since what is kept may hold no Python values but the structure.
    kept = inputs, output, stats, counts, () if of_bias else None
    return _merge(output).astype(inputs[0].dtype), kept


def _ring_backward(axis, passes, plan, kept, cotangent):
    (query, key, value, bias, scale, tokens, ranges), output, stats, counts, of_bias = kept
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)

    def one_head(k, counts, output, stats):
        q, b, table, chunk = _of_head(k, query, key, value, bias, scale, tokens, ranges)
        of_rows = output, stats, _head(cotangent, k, q.shape[2], 2)

        def visit(chunk, table, of_query, of_chunk):
            inputs = (q, chunk.key, chunk.value, b, scale, _tokens(tokens, chunk), table)
            dquery, dkey, dvalue, dbias, dscale = passes.backward(
                plan, inputs, *of_rows, of_bias=of_bias is not None
            )
            return jax.tree.map(
                jnp.add, (of_query, of_chunk), ((dquery, dbias, dscale), (dkey, dvalue))
            )

        of_query = jax.tree.map(jnp.zeros_like, (q, b, scale))
        of_chunk = tuple(jnp.zeros(x.shape, q.dtype) for x in (chunk.key, chunk.value))
        (dquery, dbias, dscale), (dkey, dvalue) = _go_round(
            axis, plan, counts, table, chunk, visit, of_query, of_chunk
        )
        return (
            dquery.astype(query.dtype),
            dkey.astype(key.dtype),
            dvalue.astype(value.dtype),
            dbias,
            dscale,
        )

    dquery, dkey, dvalue, dbias, dscale = jax.lax.map(
        lambda at: one_head(*at), (_heads(key), counts, output, stats)
    )
    of_features = (_merge(x) for x in (dquery, dkey, dvalue))
    dbias = jax.tree.map(lambda x, y: x.reshape(y.shape), dbias, bias)
    return *reverse_once((*of_features, dbias, dscale.sum())), None, None


def without_marks(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
    """Return what `symbolic_zeros` marks, unmarked, and whether the bias (at 3) is perturbed."""

    def marked(x: Any) -> bool:
        return hasattr(x, "perturbed")

    of_bias = any(x.perturbed for x in jax.tree.leaves(inputs[3], is_leaf=marked))
    return jax.tree.map(lambda x: x.value, inputs, is_leaf=marked), of_bias


ring_attention.defvjp(_ring_forward, _ring_backward, symbolic_zeros=True)


def _hops_of_all(
    axis: str, plan: Plan, ranges: tuple[Array, Array], key_heads: int
) -> tuple[Int[Array, "K"], ...]:
    """Return the hops of each ring and key head, the same on all devices of the mesh.

    All must agree, even those that do not share a ring: what a TPU does where devices leave a loop
    with communication at different times is not defined.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one_head(table: Any) -> tuple[Array, ...]:
        return hops(
            table,
            jax.lax.axis_index(axis),
            causal=plan.causal,
            devices=jax.lax.axis_size(axis),
            key_tiles=_key_tiles(plan),
        )

    batch, heads, tiles = ranges[0].shape
    tables = [x.reshape(batch, key_heads, heads // key_heads, tiles) for x in ranges]
    counts = jax.vmap(one_head, in_axes=1)(tuple(tables))
    return jax.lax.pmax(counts, tuple(mesh.manual_axes))


def _go_round(
    axis: str,
    plan: Plan,
    counts: tuple[Array, ...],
    table: tuple[Array, Array],
    chunk: Chunk,
    visit: Callable[..., tuple[Any, Any]],
    kept: Any,
    luggage: Any,
) -> tuple[Any, Any]:
    """Send chunks round; at each, `kept, luggage = visit(chunk, ranges within it, kept, luggage)`.

    `kept` stays on the device, `luggage` travels with its chunk and comes home.
    """
    device, devices, tiles = jax.lax.axis_index(axis), jax.lax.axis_size(axis), _key_tiles(plan)

    for ring, (count, (step, most)) in enumerate(
        zip(counts, _rings(plan.causal, devices), strict=True)
    ):

        def meet(hop, chunk, kept, luggage, *, ring=ring, step=step):
            start = tiles * ((device - step * hop) % devices)
            first, end = (jnp.clip(x - start, 0, tiles) for x in table)
            if ring > 0:  # a device's own chunk was met in the first
                end = jnp.where(hop == 0, first, end)
            return visit(chunk, (first, end), kept, luggage)

        def one_hop(hop, carry, *, step=step, meet=meet):
            # Nothing here depends on what is sent: it is on its way while this chunk is computed.
            following = _shift(carry[0], axis, step)
            kept, luggage = meet(hop, *carry)
            return following, kept, _shift(luggage, axis, step)

        carry = jax.lax.fori_loop(0, count, one_hop, (chunk, kept, luggage))
        kept, luggage = meet(count, *carry)
        for bit in range(most.bit_length()):
            home = partial(_shift, axis=axis, step=-step * 2**bit)
            luggage = jax.lax.cond((count >> bit) & 1, home, lambda x: x, luggage)
    return kept, luggage


def _shift(tree: Any, axis: str, step: int) -> Any:
    """Return what the device `step` places before this one has."""
    devices = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + step) % devices) for i in range(devices)])


def _combine(state: tuple[Array, Stats], part: tuple[Array, Stats]) -> tuple[Array, Stats]:
    """Return output [B, T, G, Dv] and `Stats` [B, G, T] over the keys of both."""
    parts = state, part
    highs = [jnp.where(s.largest == jnp.inf, -jnp.inf, s.largest) for _, s in parts]
    largest = jnp.maximum(*highs)
    # A row that has seen no key must not subtract -inf from -inf.
    shift = jnp.where(largest == -jnp.inf, 0.0, largest)
    totals = [s.total * jnp.exp(high - shift) for (_, s), high in zip(parts, highs, strict=True)]
    total = totals[0] + totals[1]
    none_seen = total == 0  # false for NaN
    total = jnp.where(none_seen, 1.0, total)
    ours, theirs = (
        (share / total).swapaxes(1, 2)[..., None] * output
        for share, (output, _) in zip(totals, parts, strict=True)
    )
    return ours + theirs, Stats(jnp.where(none_seen, jnp.inf, largest), total)


def _key_tiles(plan: Plan) -> int:
    return -(-plan.key_length // plan.key_tile)


def _heads(key: Array) -> Int[Array, "K"]:
    return jnp.arange(key.shape[2], dtype=jnp.int32)


def _head(x: Array, k: Array, group: int, axis: int) -> Array:
    """Return what belongs to key head k, of an axis with `group` entries for each."""
    return jax.lax.dynamic_slice_in_dim(x, k * group, group, axis)


def _of_head(
    k: Array,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    scale: Array,
    tokens: Tokens,
    ranges: tuple[Array, Array],
) -> tuple[Array, Any, tuple[Array, Array], Chunk]:
    """Return the queries, bias and ranges that go with key head k, and this device's chunk."""
    group = query.shape[2] // key.shape[2]
    first, end = (_head(x, k, group, 1) for x in ranges)
    chunk = Chunk(
        _head(key, k, 1, 2), _head(value, k, 1, 2), tokens.key_positions, tokens.key_segment_ids
    )
    # Widened, and so is what implementations return: rounded once, after all chunks.
    return (
        _head(query, k, group, 2).astype(scale.dtype),
        jax.tree.map(lambda x: _head(x, k, group, 0), bias),
        (first, end),
        chunk,
    )


def _tokens(tokens: Tokens, chunk: Chunk) -> Tokens:
    """Return the tokens of this device's queries and of a chunk's keys."""
    return tokens._replace(key_positions=chunk.positions, key_segment_ids=chunk.segment_ids)


def _merge(x: Array) -> Array:
    """Return [B, L, K * G, D] for [K, B, L, G, D]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[4])
