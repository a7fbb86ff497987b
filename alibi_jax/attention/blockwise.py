"""Blockwise attention: exact, in memory that grows with length, and only the tiles that matter.

The forward pass is the online softmax (Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats,
arXiv:2112.05682); the backward pass computes each tile again from the row's log-sum-exp (Dao et
al., arXiv:2205.14135, algorithm 4). `alibi_jax.attention.tiles` says which tiles, and proves it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from alibi_jax.attention.context import Passes, ring_attention
from alibi_jax.attention.tiles import Plan, Tokens, key_ranges
from alibi_jax.bias import distance_bias, float_dtype
from alibi_jax.typing import (
    Attended,
    Key,
    KeyPositions,
    Query,
    QueryPositions,
    SegmentIds,
    Slopes,
    Value,
)

# Queries and keys a tile; keys a step where that many are left. Small tiles make the rule tight,
# but it takes some 10^7 multiplications in a product until XLA's CPU backend uses a second core.
# Up to twice as many queries are one tile: there is little that they could leave out.
QUERY_TILE, KEY_TILE, STEP = 512, 256, 1024


def blockwise(
    query: Query,
    key: Key,
    value: Value,
    slopes: Slopes,
    *,
    causal: bool,
    scale: float | Array,
    query_positions: QueryPositions,
    key_positions: KeyPositions,
    segment_ids: SegmentIds | None,
    key_segment_ids: SegmentIds | None,
    tolerance: float,
    axis: str | None = None,
) -> Attended:
    """Compute `alibi_jax.attention`; the arguments are as that function checks and fills them.

    With `axis`, they are one device's part of sequences that a surrounding `jax.shard_map` divides
    over that mesh axis (`alibi_jax.attention.context`).

    All arithmetic is float32 (float64 for float64 inputs): 16-bit tiles are widened first.
    """
    length, key_length = query.shape[1], key.shape[1]
    tile = length if length <= 2 * QUERY_TILE else QUERY_TILE
    key_tile = min(KEY_TILE, key_length)
    dtype = float_dtype(query.dtype)
    tokens = Tokens(
        jnp.asarray(query_positions), jnp.asarray(key_positions), segment_ids, key_segment_ids
    )
    query, key, value, slopes, factor, tokens = _vary_alike(
        query, key, value, slopes.astype(dtype), jnp.asarray(scale, dtype), tokens
    )
    ranges = key_ranges(
        *jax.lax.stop_gradient((query, key, slopes, factor)),
        causal=causal,
        **tokens._asdict(),
        tolerance=tolerance,
        query_tile=tile,
        key_tile=key_tile,
        axis=axis,
    )
    attend = _attend if axis is None else partial(ring_attention, axis, PASSES)
    output = attend(
        Plan(causal, key_length, tile, key_tile),
        _pad(query, tile),
        _pad(key, key_tile),
        _pad(value, key_tile),
        slopes,
        factor,
        Tokens(*map(_pad, tokens, (tile, key_tile, tile, key_tile))),
        ranges,
    )
    return output[:, :length]


def _vary_alike(*trees: Any) -> tuple[Any, ...]:
    """Return arrays that are marked as varying over the same axes of a surrounding shard_map.

    Where one differs between devices the result does, and so must what a loop starts from. The
    transpose of the mark adds up the gradient of what is the same on all devices.
    """

    def axes(x: Array) -> frozenset[Any]:
        return jax.typeof(x).manual_axis_type.varying

    every = frozenset[Any]().union(*map(axes, jax.tree.leaves(trees)))

    def vary(x: Array) -> Array:
        missing = tuple(every - axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, trees)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, slopes, scale, tokens, ranges):
    """Return [B, T, H, Dv]; queries and keys are padded to whole tiles."""
    return _forward(plan, query, key, value, slopes, scale, tokens, ranges)[0]


def _forward(plan, query, key, value, slopes, scale, tokens, ranges):
    """Return the output, and each row's log-sum-exp [B, H, T]: +inf for keyless rows."""
    group = query.shape[2] // key.shape[2]
    dtype = slopes.dtype

    def one_tile(output: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
        b, h, i, first, end = at
        rows = i * plan.query_tile, plan.query_tile
        q = _tile(query, b, *rows, h).astype(dtype) * scale

        def step(start: Array, size: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, mixed = carry
            k, v = (_tile(x, b, start, size, h // group).astype(dtype) for x in (key, value))
            bias, _ = _tile_bias(plan, slopes[h], tokens, b, rows, (start, size), query_axis=0)
            logits = _dot(q, k, 1, 1) + bias
            new = jnp.maximum(largest, logits.max(axis=1))
            # A row that has seen no key yet must not subtract -inf from -inf.
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp(logits - shift[:, None])
            keep = jnp.exp(largest - shift)
            return (
                new,
                total * keep + weights.sum(axis=1),
                mixed * keep[:, None] + _dot(weights, v, 1, 0),
            )

        zeros = jnp.zeros(plan.query_tile, dtype)
        carry = zeros - jnp.inf, zeros, jnp.zeros((plan.query_tile, value.shape[-1]), dtype)
        carry, _ = _vary_alike(carry, q)
        largest, total, mixed = _over_keys(plan, first, end, step, carry)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, largest + jnp.log(total), jnp.inf)
        return _update(output, b, rows[0], h, mixed / total[:, None]), lse

    # Wide, and rounded at the end: XLA's CPU backend widens the whole of a 16-bit array, and rounds
    # it again, for every tile that is written into it.
    output = jnp.zeros((*query.shape[:3], value.shape[-1]), dtype)
    output, _ = _vary_alike(output, query)
    output, lse = jax.lax.scan(one_tile, output, _tiles(ranges))
    return output.astype(query.dtype), lse.reshape(query.shape[0], query.shape[2], -1)


def _attend_forward(plan, query, key, value, slopes, scale, tokens, ranges):
    of_slopes = slopes.perturbed
    inputs = (query, key, value, slopes, scale, tokens, ranges)
    inputs = jax.tree.map(lambda x: x.value, inputs, is_leaf=lambda x: hasattr(x, "perturbed"))
    output, lse = _forward(plan, *inputs)
    # A tuple or None, since what is kept may hold no Python values but the structure.
    return output, (inputs, output, lse, () if of_slopes else None)


def _attend_backward(plan, kept, cotangent):
    inputs, output, lse, of_slopes = kept
    query, key, value, *_ = inputs
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        cotangent, _ = _vary_alike(cotangent, query)
    dquery, dkey, dvalue, *rest = _backward(
        plan, inputs, output, lse, cotangent, of_slopes=of_slopes is not None
    )
    grads = dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)
    return *grads, *rest, None, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _backward(plan, inputs, output, lse, cotangent, *, of_slopes):
    """Return the gradients of query, key, value, slopes and scale, all of them wide."""
    query, key, value, slopes, scale, tokens, ranges = inputs
    group = query.shape[2] // key.shape[2]
    dtype = slopes.dtype

    def one_tile(grads, at):
        (b, h, i, first, end), row_lse = at
        rows = i * plan.query_tile, plan.query_tile
        q, out, dout = (_tile(x, b, *rows, h).astype(dtype) for x in (query, output, cotangent))
        # sum_j p_ij dp_ij, which the derivative of softmax takes from each dp_ij.
        mean = jnp.sum(out * dout, axis=1)
        scaled = q * scale

        # Keys lie along axis 0 here: then all products multiply row-major matrices, once the keys
        # are transposed for the last. The barrier keeps XLA from undoing that: on a CPU the product
        # of [s, D] and [s, t] over s runs at four fifths of the speed.
        def step(start, size, carry):
            dq, dslope, dkey, dvalue = carry
            k, v = (_tile(x, b, start, size, h // group).astype(dtype) for x in (key, value))
            bias, distance = _tile_bias(
                plan, slopes[h], tokens, b, rows, (start, size), query_axis=1
            )
            weights = jnp.exp(_dot(k, scaled, 1, 1) + bias - row_lse[None, :])
            dlogits = weights * (_dot(v, dout, 1, 1) - mean[None, :])
            dkey = _update(dkey, b, start, h // group, _dot(dlogits, scaled, 1, 0), add=True)
            dvalue = _update(dvalue, b, start, h // group, _dot(weights, dout, 1, 0), add=True)
            if of_slopes:
                dslope -= jnp.sum(dlogits * jnp.abs(distance).astype(dtype))
            transposed = jax.lax.optimization_barrier(k.T)
            return dq + _dot(transposed, dlogits, 1, 0), dslope, dkey, dvalue

        dquery, dscale, dkey, dvalue = grads
        carry = jnp.zeros_like(q.T), jnp.zeros((), dtype), dkey, dvalue
        carry, _ = _vary_alike(carry, q)
        dq, dslope, dkey, dvalue = _over_keys(plan, first, end, step, carry)
        dscale += jnp.sum(dq * q.T)
        dquery = _update(dquery, b, rows[0], h, dq.T * scale)
        return (dquery, dscale, dkey, dvalue), dslope

    zeros = (
        jnp.zeros(query.shape, dtype),
        jnp.zeros((), dtype),
        jnp.zeros(key.shape, dtype),
        jnp.zeros(value.shape, dtype),
    )
    zeros, _ = _vary_alike(zeros, query)
    (dquery, dscale, dkey, dvalue), dslope = jax.lax.scan(
        one_tile, zeros, (_tiles(ranges), lse.reshape(-1, plan.query_tile))
    )
    batch, _, heads, _ = query.shape
    dslopes = dslope.reshape(batch, heads, -1).sum(axis=(0, 2))
    return dquery, dkey, dvalue, dslopes, dscale


PASSES = Passes(_forward, _backward)


def _over_keys(
    plan: Plan, first: Array, end: Array, step: Callable[..., Any], carry: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Run `step(start, size, carry)` over key tiles first to end.

    It takes STEP keys at a time, and what is then left in halves of that: a tile alone is too small
    a product for two cores.
    """
    count = max(min(STEP, plan.key_length) // plan.key_tile, 1)
    while count:
        num_steps = (end - first) // count

        def run(j: Array, carry: Any, first: Array = first, count: int = count) -> Any:
            return step((first + j * count) * plan.key_tile, count * plan.key_tile, carry)

        carry = jax.lax.fori_loop(0, num_steps, run, carry)
        first, count = first + num_steps * count, count // 2
    return carry


def _tile_bias(
    plan: Plan,
    slope: Array,
    tokens: Tokens,
    b: Array,
    rows: tuple[Array, int],
    columns: tuple[Array, int],
    *,
    query_axis: int,
) -> tuple[Array, Array]:
    """Return bias, -inf where masked, and distance: [t, s], or [s, t] if `query_axis` is 1.

    `rows` and `columns` say where the tile starts, and its size.
    """

    def both(of_query: Any, of_key: Any) -> tuple[Array, Array]:
        q, k = _tile(of_query, b, *rows), _tile(of_key, b, *columns)
        return jnp.expand_dims(q, 1 - query_axis), jnp.expand_dims(k, query_axis)

    position, key_position = both(tokens.query_positions, tokens.key_positions)
    distance = position - key_position
    bias = distance_bias(slope[None], distance, kind="causal" if plan.causal else "symmetric")[0]
    if tokens.segment_ids is not None:
        segment, key_segment = both(tokens.segment_ids, tokens.key_segment_ids)
        bias = jnp.where(segment == key_segment, bias, -jnp.inf)
    if plan.key_length % plan.key_tile:
        exists = columns[0] + jnp.arange(columns[1], dtype=jnp.int32) < plan.key_length
        bias = jnp.where(jnp.expand_dims(exists, query_axis), bias, -jnp.inf)
    return bias, distance


def _tiles(ranges: tuple[Array, Array]) -> tuple[Array, ...]:
    """Return batch, head, query tile, first and end of each tile of queries, all [B * H * nT]."""
    indices = jnp.indices(ranges[0].shape, dtype=jnp.int32)
    return tuple(x.reshape(-1) for x in (*indices, *ranges))


def _pad(x: Any, tile: int) -> Any:
    """Return [B, L, ...] with L filled up to whole tiles; None stays None."""
    if x is None:
        return None
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2))


def _tile(x: Array, b: Array, start: Array, size: int, head: Array | None = None) -> Array:
    """Return x[b, start : start + size] of [B, L], or also [head] of [B, L, H, D]."""
    if head is None:
        # Positions may have one row for all batches: an index past the end means the last.
        return jax.lax.dynamic_slice(x, (b, start), (1, size))[0]
    zero = jnp.zeros((), jnp.int32)
    tile = jax.lax.dynamic_slice(x, (b, start, head, zero), (1, size, 1, x.shape[3]))
    return tile.reshape(size, x.shape[3])


def _update(
    x: Array, b: Array, start: Array, head: Array, tile: Array, *, add: bool = False
) -> Array:
    """Return x [B, L, H, D] with the tile [size, D] written, or added, where `_tile` reads it."""
    if add:
        tile += _tile(x, b, start, len(tile), head)
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_update_slice(x, tile[None, :, None], (b, start, head, zero))


def _dot(a: Array, b: Array, axis: int, other_axis: int) -> Array:
    exact = jax.lax.Precision.HIGHEST  # or accelerators would round float32 to 16 bits
    return jax.lax.dot_general(a, b, (((axis,), (other_axis,)), ((), ())), precision=exact)
