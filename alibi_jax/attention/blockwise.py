"""Blockwise attention: exact, in memory that grows with length, and only the tiles that matter.

The forward pass is the online softmax (Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats,
arXiv:2112.05682); the backward pass computes each tile again from the row's log-sum-exp (Dao et
al., arXiv:2205.14135, algorithm 4). `alibi_jax.attention.tiles` says which tiles, and proves it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Int

from alibi_jax.attention.biases import Bias, Parts, has_sink
from alibi_jax.attention.case import Case
from alibi_jax.attention.context import Passes, ring_attention, without_marks
from alibi_jax.attention.derivatives import reverse_once
from alibi_jax.attention.nonfinite import as_nan_keys, as_nan_rows, finite, finite_for_gradients
from alibi_jax.attention.tiles import SLACK, Plan, Stats, Tokens, key_ranges
from alibi_jax.bias import float_dtype
from alibi_jax.typing import (
    Attended,
    Key,
    KeyPositions,
    Query,
    QueryPositions,
    SegmentIds,
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
    bias: Bias,
    *,
    causal: bool,
    scale: float | Array,
    query_positions: QueryPositions,
    key_positions: KeyPositions,
    segment_ids: SegmentIds | None,
    key_segment_ids: SegmentIds | None,
    window: Int[Array, ""] | None,
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
    positions = jnp.asarray(query_positions), jnp.asarray(key_positions)
    tokens = Tokens(*positions, segment_ids, key_segment_ids, window)
    query, key, value, bias, factor, tokens = _vary_alike(
        query, key, value, bias, jnp.asarray(scale, dtype), tokens
    )
    if axis is None and max(length, key_length) <= 2 * QUERY_TILE:
        # One tile of queries, whose first and last leave out next to nothing between them.
        first = jnp.full((len(query), query.shape[2], 1), int(has_sink(bias)), jnp.int32)
        ranges = _vary_alike((first, jnp.full_like(first, -(-key_length // key_tile))), query)[0]
    else:
        ranges = key_ranges(
            *jax.lax.stop_gradient((query, key, bias, factor)),
            causal=causal,
            **tokens._asdict(),
            tolerance=tolerance,
            query_tile=tile,
            key_tile=key_tile,
            axis=axis,
            value=jax.lax.stop_gradient(value),
        )
    attend = _attend if axis is None else partial(ring_attention, axis, PASSES)
    tiles = tile, key_tile
    pad_edge = partial(_pad, mode="edge")
    output = attend(
        Plan(causal, key_length, *tiles, sink=has_sink(bias), step=min(STEP, key_length)),
        _pad(query, tile),
        _pad(key, key_tile),
        _pad(value, key_tile),
        # With what is there: a bias may be finite nowhere else.
        bias.with_parts(Parts(bias.parts.heads, *map(pad_edge, bias.parts[1:], tiles))),
        factor,
        Tokens(*map(pad_edge, tokens[:4], tiles + tiles))._replace(window=tokens.window),
        ranges,
    )
    return output[:, :length]


def refusal(case: Case) -> str | None:
    """Return why `blockwise` cannot serve a case, or None if it can."""
    if case.length_sharded and case.beyond_slopes in ("PrefixBias", "sink"):
        return f"needs whole sequences for a {case.beyond_slopes}, and these are divided"
    return None


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
def _attend(plan, query, key, value, bias, scale, tokens, ranges):
    """Return [B, T, H, Dv]; queries and keys are padded to whole tiles."""
    return _forward(plan, query, key, value, bias, scale, tokens, ranges)[0].astype(query.dtype)


def _forward(plan, query, key, value, bias, scale, tokens, ranges):
    """Return the output, wide, and the `Stats` of its rows."""
    group = query.shape[2] // key.shape[2]
    dtype = scale.dtype

    def one_tile(output: Array, at: tuple[Array, ...]) -> tuple[Array, Stats]:
        b, h, i, first, end = at
        rows = i * plan.query_tile, plan.query_tile
        q = as_nan_rows(_tile(query, b, *rows, h).astype(dtype)) * scale

        def step(start: Array, size: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, mixed = carry
            columns = start, size
            k, v = (_tile(x, b, *columns, h // group).astype(dtype) for x in (key, value))
            k, v = as_nan_keys(k, v)
            pairs = _pairs(plan, tokens, b, rows, columns, query_axis=0)
            tile_bias = _tile_bias(bias, _parts(bias, b, h, rows, columns), pairs)
            logits = jnp.where(pairs.seen, _dot(q, k, 1, 1) + tile_bias, -jnp.inf)
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
        none_seen = total == 0  # false for NaN
        total = jnp.where(none_seen, 1.0, total)
        largest = jnp.where(none_seen, jnp.inf, largest)
        return _update(output, b, rows[0], h, mixed / total[:, None]), Stats(largest, total)

    # Wide, and rounded at the end: XLA's CPU backend widens the whole of a 16-bit array, and rounds
    # it again, for every tile that is written into it. The backward pass needs it unrounded.
    output = jnp.zeros((*query.shape[:3], value.shape[-1]), dtype)
    output, _ = _vary_alike(output, query)
    output, stats = jax.lax.scan(one_tile, output, _tiles(ranges))
    return output, jax.tree.map(lambda x: x.reshape(query.shape[0], query.shape[2], -1), stats)


def _attend_forward(plan, *inputs):
    inputs, of_bias = without_marks(inputs)
    output, stats = _forward(plan, *inputs)
    # A tuple or None, since what is kept may hold no Python values but the structure.
    return output.astype(inputs[0].dtype), (inputs, output, stats, () if of_bias else None)


def _attend_backward(plan, kept, cotangent):
    inputs, output, stats, of_bias = kept
    query, key, value, *_ = inputs
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        cotangent, _ = _vary_alike(cotangent, query)
    dquery, dkey, dvalue, *rest = _backward(
        plan, inputs, output, stats, cotangent, of_bias=of_bias is not None
    )
    grads = dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)
    return *reverse_once((*grads, *rest)), None, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


@partial(jax.jit, static_argnames=("plan", "of_bias"))  # for an eager `jax.grad`
def _backward(plan, inputs, output, stats, cotangent, *, of_bias):
    """Return the gradients of query, key, value, bias and scale, all of them wide."""
    query, key, value, bias, scale, tokens, ranges = inputs
    group = query.shape[2] // key.shape[2]
    dtype = scale.dtype

    def one_tile(grads, at):
        (b, h, i, first, end), (largest, total) = at
        rows = i * plan.query_tile, plan.query_tile
        q, out, dout = (_tile(x, b, *rows, h).astype(dtype) for x in (query, output, cotangent))
        q, dout, largest, total = finite_for_gradients(q, dout, largest, total)
        # The weights below are not normalised, and what they are multiplied with is.
        dout /= total[:, None]
        # sum_j p_ij dp_ij, which the derivative of softmax takes from each dp_ij.
        mean = jnp.sum(out * dout, axis=1)
        scaled = q * scale

        # Keys lie along axis 0 here: then all products multiply row-major matrices, once the keys
        # are transposed for the last. The barrier keeps XLA from undoing that: on a CPU the product
        # of [s, D] and [s, t] over s runs at four fifths of the speed.
        def step(start, size, carry):
            dq, dhead_part, dkey, dvalue, dkey_part = carry
            columns = start, size
            # Rows that see what is not finite have NaN weights anyway.
            k, v = (finite(_tile(x, b, *columns, h // group).astype(dtype)) for x in (key, value))
            pairs = _pairs(plan, tokens, b, rows, columns, query_axis=1)
            parts = _parts(bias, b, h, rows, columns)
            logits = _dot(k, scaled, 1, 1) + _tile_bias(bias, parts, pairs)
            logits -= largest[None, :]
            # At most 0, but for other rounding than in the forward pass. (False for NaN.)
            logits = jnp.where(logits > SLACK, SLACK, logits)
            weights = jnp.exp(jnp.where(pairs.seen, logits, -jnp.inf))
            dweights = _dot(v, dout, 1, 1) - mean[None, :]
            dlogits = jnp.where(pairs.seen, weights * dweights, 0.0)
            dkey = _update(dkey, b, start, h // group, _dot(dlogits, scaled, 1, 0), add=True)
            dvalue = _update(dvalue, b, start, h // group, _dot(weights, dout, 1, 0), add=True)
            if of_bias:
                _, pullback = jax.vjp(lambda parts: _tile_bias(bias, parts, pairs), parts)
                (dparts,) = pullback(dlogits)
                dhead_part = jax.tree.map(jnp.add, dhead_part, dparts.heads)
                dkey_part = jax.tree.map(
                    lambda x, tile: _update(x, b, start, h, tile, add=True), dkey_part, dparts.keys
                )
            transposed = jax.lax.optimization_barrier(k.T)
            return dq + _dot(transposed, dlogits, 1, 0), dhead_part, dkey, dvalue, dkey_part

        dquery, dscale, *of_keys = grads
        dhead_part = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), bias.parts.heads)
        carry, _ = _vary_alike((jnp.zeros_like(q.T), dhead_part, *of_keys), q)
        dq, dhead_part, *of_keys = _over_keys(plan, first, end, step, carry)
        dscale += jnp.sum(dq * q.T)
        dquery = _update(dquery, b, rows[0], h, dq.T * scale)
        return (dquery, dscale, *of_keys), dhead_part

    zeros = (
        jnp.zeros(query.shape, dtype),
        jnp.zeros((), dtype),
        jnp.zeros(key.shape, dtype),
        jnp.zeros(value.shape, dtype),
        jax.tree.map(jnp.zeros_like, bias.parts.keys),
    )
    zeros, _ = _vary_alike(zeros, query)
    (dquery, dscale, dkey, dvalue, dkey_part), dhead_parts = jax.lax.scan(
        one_tile,
        zeros,
        (_tiles(ranges), jax.tree.map(lambda x: x.reshape(-1, plan.query_tile), stats)),
    )
    batch, _, heads, _ = query.shape
    dhead_parts = jax.tree.map(
        lambda x: x.reshape(batch, heads, -1, *x.shape[1:]).sum(axis=(0, 2)), dhead_parts
    )
    # What belongs to a query adds the same to a whole row, which softmax ignores.
    dquery_part = jax.tree.map(jnp.zeros_like, bias.parts.queries)
    return dquery, dkey, dvalue, bias.with_parts(Parts(dhead_parts, dquery_part, dkey_part)), dscale


PASSES = Passes(_forward, _backward)


def _over_keys(
    plan: Plan, first: Array, end: Array, step: Callable[..., Any], carry: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Run `step(start, size, carry)` over key tiles first to end.

    It takes `plan.step` keys at a time, and what is then left in halves of that: a tile alone is
    too small a product for two cores. Where the first key is a sink, tile 0 comes before the range.
    """
    if plan.sink:
        carry = step(jnp.zeros_like(first), plan.key_tile, carry)
    count = max(plan.step // plan.key_tile, 1)
    while count:
        num_steps = (end - first) // count

        def run(j: Array, carry: Any, first: Array = first, count: int = count) -> Any:
            return step((first + j * count) * plan.key_tile, count * plan.key_tile, carry)

        carry = jax.lax.fori_loop(0, num_steps, run, carry)
        first, count = first + num_steps * count, count // 2
    return carry


class Pairs(NamedTuple):
    """What a tile's queries and keys are to each other: [t, s], or [s, t] if `query_axis` is 1."""

    distance: Int[Array, "t s"]  # at least 0
    position: Int[Array, "t 1"]  # the query's
    seen: Bool[Array, "#t #s"]  # False where a mask hides the key
    query_axis: int


def _pairs(
    plan: Plan,
    tokens: Tokens,
    b: Array,
    rows: tuple[Array, int],
    columns: tuple[Array, int],
    *,
    query_axis: int,
) -> Pairs:
    """Return the pairs of a tile; `rows` and `columns` say where it starts, and its size."""

    def both(of_query: Any, of_key: Any) -> tuple[Array, Array]:
        q, k = _tile(of_query, b, *rows), _tile(of_key, b, *columns)
        return jnp.expand_dims(q, 1 - query_axis), jnp.expand_dims(k, query_axis)

    index = jnp.expand_dims(columns[0] + jnp.arange(columns[1], dtype=jnp.int32), query_axis)
    position, key_position = both(tokens.query_positions, tokens.key_positions)
    signed = position - key_position  # whose sign is right even where positions wrap round
    distance = jnp.abs(signed)
    seen = signed >= 0 if plan.causal else jnp.ones((1, 1), bool)
    if plan.sink:
        distance = jnp.where(index == 0, 0, distance)
    if tokens.window is not None:
        seen &= distance < tokens.window
    if tokens.segment_ids is not None:
        segment, key_segment = both(tokens.segment_ids, tokens.key_segment_ids)
        seen &= segment == key_segment
    if plan.key_length % plan.key_tile:
        seen &= index < plan.key_length
    return Pairs(distance, position, seen, query_axis)


def _parts(
    bias: Bias, b: Array, h: Array, rows: tuple[Array, int], columns: tuple[Array, int]
) -> Parts:
    """Return what one tile of one head needs of a bias: leaves [...], [t] and [s]."""
    heads, queries, keys = bias.parts
    return Parts(
        jax.tree.map(lambda x: x[h], heads),
        jax.tree.map(lambda x: _tile(x, b, *rows, h), queries),
        jax.tree.map(lambda x: _tile(x, b, *columns, h), keys),
    )


def _tile_bias(bias: Bias, parts: Parts, pairs: Pairs) -> Array:
    """Return the bias of a tile, masks aside: the method, for every pair of the tile."""
    axis = pairs.query_axis
    queries = jax.tree.map(lambda x: jnp.expand_dims(x, 1 - axis), parts.queries)
    keys = jax.tree.map(lambda x: jnp.expand_dims(x, axis), parts.keys)
    return bias.at(parts.heads, queries, keys, pairs.distance, pairs.position)


def _tiles(ranges: tuple[Array, Array]) -> tuple[Array, ...]:
    """Return batch, head, query tile, first and end of each tile of queries, all [B * H * nT]."""
    indices = jnp.indices(ranges[0].shape, dtype=jnp.int32)
    return tuple(x.reshape(-1) for x in (*indices, *ranges))


def _pad(tree: Any, tile: int, mode: str = "constant") -> Any:
    """Return arrays [B, L, ...] with L filled up to whole tiles, as `jnp.pad` does."""

    def pad(x: Array) -> Array:
        widths = [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, mode=mode)

    return jax.tree.map(pad, tree)


def _tile(x: Array, b: Array, start: Array, size: int, head: Array | None = None) -> Array:
    """Return x[b, start : start + size] of [B, L], or also [head] of [B, L, H, ...]."""
    if head is None:
        # Positions may have one row for all batches: an index past the end means the last.
        return jax.lax.dynamic_slice(x, (b, start), (1, size))[0]
    rest = x.shape[3:]
    tile = jax.lax.dynamic_slice(x, _corner(x, b, start, head), (1, size, 1, *rest))
    return tile.reshape(size, *rest)


def _update(
    x: Array, b: Array, start: Array, head: Array, tile: Array, *, add: bool = False
) -> Array:
    """Return x [B, L, H, ...] with the tile [size, ...] written, or added, where `_tile` reads."""
    if add:
        tile += _tile(x, b, start, len(tile), head)
    return jax.lax.dynamic_update_slice(x, tile[None, :, None], _corner(x, b, start, head))


def _corner(x: Array, b: Array, start: Array, head: Array) -> tuple[Array, ...]:
    return b, start, head, *(jnp.zeros((), jnp.int32),) * (x.ndim - 3)


def _dot(a: Array, b: Array, axis: int, other_axis: int) -> Array:
    exact = jax.lax.Precision.HIGHEST  # or accelerators would round float32 to 16 bits
    return jax.lax.dot_general(a, b, (((axis,), (other_axis,)), ((), ())), precision=exact)
