"""Attention on TPUs: our own Pallas kernels, which neither fetch nor compute negligible tiles.

FlashAttention-2 (Dao, arXiv:2307.08691) over the tiles that `alibi_jax.attention.tiles` selects.
There are three kernels: forward, the gradient of queries (and slopes and scale), and that of keys
and values. Each step of a grid holds one tile of its own side in VMEM, reads from SMEM which tiles
of the other side it needs, and loops over these, fetching the next while it computes one. A tile
left out costs nothing, not even an empty step of the grid.

The own tile lies along the rows of the logits and the other along their columns, so that no product
has to transpose a matrix. Numbers that there is one of a token lie along lanes in HBM, where a
column would be padded to 128 lanes; those of the own tile are turned into columns once.

What a mask hides is chosen over, never added to (`alibi_jax.attention.nonfinite`), and nothing
relies on what the maximum or minimum of a TPU makes of NaN.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from alibi_jax.attention.biases import LinearBias
from alibi_jax.attention.case import Case, refusal_beyond_slopes
from alibi_jax.attention.context import Passes, ring_attention
from alibi_jax.attention.derivatives import only_once
from alibi_jax.attention.nonfinite import as_nan_keys, as_nan_rows, finite, finite_for_gradients
from alibi_jax.attention.tiles import SLACK, Plan, Stats, Tokens, key_ranges
from alibi_jax.bias import distance_bias
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

# Multiples of the 128 lanes. Small tiles make the rule tight, large ones keep the matrix unit busy.
QUERY_TILE, KEY_TILE = 512, 512
LANES = 128
# What `pl.pallas_call` takes: tests set True, or `pltpu.InterpretParams(...)`, to run on a CPU.
INTERPRET: Any = False


class Inputs(NamedTuple):
    """What the kernels read, with lengths of whole tiles; in the kernels, references to it."""

    query: Float[Array, "B H T D"]
    key: Float[Array, "B K S D"]
    value: Float[Array, "B K S Dv"]
    numbers: Float[Array, "H 1 2"]  # the slope of each head, and the scale
    query_tokens: Int[Array, "B C T"]  # positions and, if there are any, segment ids
    key_tokens: Int[Array, "B C S"]
    ranges: Int[Array, "B H 2 nT"]  # the first key tile to compute, and the one to stop before


def refusal(case: Case) -> str | None:
    """Return why `pallas_tpu` cannot serve a case, or None if it can."""
    if case.platform != "tpu" and not INTERPRET:
        return f"needs a TPU, and this is a {case.platform}"
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {case.dtype}"
    if max(case.head_dim, case.value_dim) > 256:
        return f"takes head dims up to 256, not {max(case.head_dim, case.value_dim)}"
    return refusal_beyond_slopes(case)


def pallas_tpu(
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

    Products multiply in the inputs' dtype, float32 without rounding to bfloat16; all else is
    float32. In a `jax.shard_map` of your own, say `check_vma=False`.
    """
    key, value = as_nan_keys(key, value)
    length, key_length = query.shape[1], key.shape[1]
    plan = Plan(
        causal,
        key_length,
        query_tile=min(QUERY_TILE, -(-length // LANES) * LANES),
        key_tile=min(KEY_TILE, -(-key_length // LANES) * LANES),
    )
    slopes, scale = slopes.astype(jnp.float32), jnp.asarray(scale, jnp.float32)
    tokens = Tokens(
        jnp.asarray(query_positions), jnp.asarray(key_positions), segment_ids, key_segment_ids
    )
    ranges = key_ranges(
        *jax.lax.stop_gradient((query, key, LinearBias(slopes), scale)),
        causal=causal,
        **tokens._asdict(),
        tolerance=tolerance,
        query_tile=plan.query_tile,
        key_tile=plan.key_tile,
        axis=axis,
    )

    def padded(x: Any, tile: int, **mode: Any) -> Any:
        """Return [B, L, ...] with L filled up to whole tiles; None stays None."""
        if x is None:
            return None
        widths = [(0, -n % tile if at == 1 else 0) for at, n in enumerate(x.shape)]
        return jnp.pad(x, widths, **mode)

    arrays = (
        padded(as_nan_rows(query), plan.query_tile),
        padded(key, plan.key_tile),
        padded(value, plan.key_tile),
        slopes,
        scale,
        # Rows of the padding see what the last row sees, and no NaN that no row sees.
        Tokens(*map(partial(padded, mode="edge"), tokens, (plan.query_tile, plan.key_tile) * 2)),
        ranges,
    )
    if axis is not None:
        return ring_attention(axis, PASSES, plan, *arrays)[:, :length]
    return _attend(plan, _inputs(*arrays)).swapaxes(1, 2)[:, :length]


def _inputs(query, key, value, slopes, scale, tokens, ranges):
    """Return what the kernels read of [B, T, H, D], [B, S, K, D], `Tokens` and so on."""

    def rows(*of_tokens: Array | None) -> Array:
        given = (x for x in of_tokens if x is not None)
        return jnp.stack([jnp.broadcast_to(x, (len(query), x.shape[1])) for x in given], axis=1)

    return Inputs(
        # A tile is a matrix of tokens and features, so these are the last two axes.
        query.swapaxes(1, 2),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        jnp.stack([slopes, jnp.full_like(slopes, scale)], axis=1)[:, None],
        rows(tokens.query_positions, tokens.segment_ids),
        rows(tokens.key_positions, tokens.key_segment_ids),
        jnp.stack(ranges, axis=2),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, inputs):
    """Return [B, H, T, Dv]."""
    return _values(plan, inputs, inputs.query.dtype)[0]


def _attend_forward(plan, inputs):
    of_bias = inputs.numbers.perturbed
    inputs = Inputs(*(x.value for x in inputs))
    # Unrounded, since gradients are differences from it.
    output, stats = _values(plan, inputs, jnp.float32)
    # A tuple or None, since what is kept may hold no Python values but the structure.
    return output.astype(inputs.query.dtype), (inputs, output, stats, () if of_bias else None)


def _attend_backward(plan, kept, cotangent):
    inputs, output, stats, of_bias = kept
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
    dquery, dkey, dvalue, dnumbers = _gradients(
        plan, inputs, output, stats, cotangent, inputs.query.dtype, of_bias=of_bias is not None
    )
    of_integers: Any = None
    return (Inputs(dquery, dkey, dvalue, dnumbers, of_integers, of_integers, of_integers),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _values(plan, inputs, dtype):
    """Return the output in a dtype, and the statistics of rows: see `_forward`."""
    return _one_by_one(partial(_forward, dtype=dtype), plan, only_once(inputs))


# jit, or an eager `jax.grad` would compile the kernels anew each time.
@partial(jax.jit, static_argnames=("plan", "dtype", "of_bias"))
def _gradients(plan, inputs, output, stats, cotangent, dtype, *, of_bias):
    """Return the gradients of query, key and value in a dtype, and of the numbers."""
    inputs, output, stats, cotangent = only_once((inputs, output, stats, cotangent))
    # The barrier, since the compiler for v5p fails where this and a loss are one fusion.
    output, stats, cotangent = jax.lax.optimization_barrier((output, stats, cotangent))
    query, cotangent, largest, total = finite_for_gradients(
        inputs.query, cotangent, stats[:, :, 0], stats[:, :, 1]
    )
    inputs = inputs._replace(query=query, key=finite(inputs.key), value=finite(inputs.value))
    # sum_j p_ij dp_ij, which the derivative of softmax takes from each dp_ij.
    mean = jnp.sum(output * cotangent.astype(jnp.float32), axis=3)
    # In these two a NaN lasts through the kernels: a minimum may pass over that of `largest`.
    poison = jnp.where(jnp.isnan(largest), jnp.nan, 0.0)
    rows = jnp.stack([largest, 1 / total + poison, mean + poison], axis=2)
    of_query = partial(_query_gradient, of_bias=of_bias, dtype=dtype)
    dquery, dnumbers = _one_by_one(of_query, plan, inputs, cotangent, rows)
    of_key = partial(_key_gradient, dtype=dtype)
    dkey, dvalue = _one_by_one(of_key, plan, inputs, cotangent, rows)
    return dquery, dkey, dvalue, dnumbers.sum(axis=(0, 3))[:, None]


def _pass_forward(plan, query, key, *rest):
    # The query was widened to say what is wanted, but multiplies as it was.
    output, stats = _values(plan, _inputs(query.astype(key.dtype), key, *rest), jnp.float32)
    return output.swapaxes(1, 2), Stats(stats[:, :, 0], stats[:, :, 1])


def _pass_backward(plan, inputs, output, stats, cotangent, *, of_bias):
    query, key, *rest = inputs
    *of_features, dnumbers = _gradients(
        plan,
        _inputs(query.astype(key.dtype), key, *rest),
        output.swapaxes(1, 2),
        jnp.stack(stats, axis=2),
        cotangent.swapaxes(1, 2),
        query.dtype,
        of_bias=of_bias,
    )
    dslopes, dscale = dnumbers[:, 0, 0], dnumbers[:, 0, 1].sum()
    return *(x.swapaxes(1, 2) for x in of_features), dslopes, dscale


PASSES = Passes(_pass_forward, _pass_backward)


def _one_by_one(call: Callable[..., Any], plan: Plan, *arrays: Any) -> Any:
    """Call; `jax.vmap` makes it a loop, since Pallas cannot add an axis to arrays left in HBM."""
    return jax.custom_batching.sequential_vmap(partial(call, plan))(*arrays)


def _forward(plan: Plan, x: Inputs, *, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return the output, and largest and total of each row, f32[B, H, 2, T]: see `Stats`."""
    (batch, heads, length, _), value_dim, tile = x.query.shape, x.value.shape[3], plan.query_tile

    def kernel(x, output, stats, largest, total, mixed):
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)
        columns = x.query_tokens[...].T

        def step(j, key, value, key_tokens):
            logits, _, seen = _logits(
                plan, x.numbers, x.query, key, columns, key_tokens, j, key_axis=1
            )
            logits = _where(seen, logits, -jnp.inf)
            new = jnp.maximum(largest[...], logits.max(axis=1, keepdims=True))
            # A row that has seen no key yet must not subtract -inf from -inf.
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp(logits - shift)
            keep = jnp.exp(largest[...] - shift)
            largest[...] = new
            # Of what is multiplied: then what all values have in common is not rounded with it.
            weights = weights.astype(value.dtype)
            total[...] = total[...] * keep + weights.astype(jnp.float32).sum(axis=1, keepdims=True)
            mixed[...] = mixed[...] * keep + _product(weights, value[...])

        _over_keys(step, plan, x, heads)
        none_seen = total[...] == 0  # false for NaN
        sums = jnp.where(none_seen, 1.0, total[...])
        output[...] = (mixed[...] / sums).astype(output.dtype)
        stats[:1] = jnp.where(none_seen, jnp.inf, largest[...]).T
        stats[1:] = sums.T

    return pl.pallas_call(
        kernel,
        grid=(batch, heads, length // tile),
        in_specs=(_of_query_tiles(plan, x),),
        out_specs=(_features(tile, value_dim), _rows(tile, 2)),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, length, value_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, 2, length), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((tile, n), jnp.float32) for n in (1, 1, value_dim)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=INTERPRET,
        name="alibi_forward",
    )(x)


def _query_gradient(
    plan: Plan,
    x: Inputs,
    cotangent: Float[Array, "B H T Dv"],
    rows: Float[Array, "B H 3 T"],
    *,
    of_bias: bool,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """Return dquery, and what each row adds to dslopes and dscale, f32[B, H, 2, T].

    `rows` are each row's largest logit, the inverse of its total, and the mean of its dp under p.
    In a row that sees what is not finite the last two are NaN, and all else is finite.
    """
    (batch, heads, length, head_dim), tile = x.query.shape, plan.query_tile

    def kernel(x, cotangent, rows, dquery, dnumbers, dlogits_key, dslope):
        dlogits_key[...] = jnp.zeros_like(dlogits_key)
        dslope[...] = jnp.zeros_like(dslope)
        columns = x.query_tokens[...].T
        largest, inverse, mean = rows[:1].T, rows[1:2].T, rows[2:].T

        def step(j, key, value, key_tokens):
            logits, distance, seen = _logits(
                plan, x.numbers, x.query, key, columns, key_tokens, j, key_axis=1
            )
            dweights = _product(cotangent[...], value[...], transposed=True)
            # Without the inverse, with which the sums are multiplied once.
            dlogits = _where(seen, _weights(logits, largest) * (dweights - mean), 0.0)
            dlogits_key[...] += _product(dlogits, key[...])
            if of_bias:
                linear = dlogits * jnp.abs(distance).astype(jnp.float32)
                dslope[...] -= linear.sum(axis=1, keepdims=True)

        _over_keys(step, plan, x, heads)
        # The mean brought NaN to where it belongs, and a row that sees no key has none.
        inverse = jnp.where(jnp.isnan(inverse), 1.0, inverse)
        dlogits_key[...] *= inverse
        dquery[...] = (dlogits_key[...] * x.numbers[0, 1]).astype(dquery.dtype)
        dnumbers[:1] = (dslope[...] * inverse).T
        dscale = dlogits_key[...] * x.query[...].astype(jnp.float32)
        dnumbers[1:] = dscale.sum(axis=1, keepdims=True).T

    return pl.pallas_call(
        kernel,
        grid=(batch, heads, length // tile),
        in_specs=(_of_query_tiles(plan, x), _features(tile, x.value.shape[3]), _rows(tile, 3)),
        out_specs=(_features(tile, head_dim), _rows(tile, 2)),
        out_shape=(
            jax.ShapeDtypeStruct(x.query.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, 2, length), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((tile, n), jnp.float32) for n in (head_dim, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=INTERPRET,
        name="alibi_query_gradient",
    )(x, cotangent, rows)


def _key_gradient(
    plan: Plan,
    x: Inputs,
    cotangent: Float[Array, "B H T Dv"],
    rows: Float[Array, "B H 3 T"],
    *,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """Return dkey and dvalue; the grid's last axis goes over the query heads of a key head."""
    heads, (batch, key_heads, key_length, head_dim) = x.query.shape[1], x.key.shape
    value_dim, group, tile = x.value.shape[3], heads // key_heads, plan.key_tile

    def kernel(x, cotangent, rows, ranges, dkey, dvalue, dkey_sum, dvalue_sum):
        b, k, j, g = (pl.program_id(axis) for axis in range(4))
        columns, h = x.key_tokens[...].T, k * group + g

        @pl.when(g == 0)
        def start():
            dkey_sum[...] = jnp.zeros_like(dkey_sum)
            dvalue_sum[...] = jnp.zeros_like(dvalue_sum)

        def step(i, query, cotangent, query_tokens, rows):
            @pl.when((x.ranges[0, i] <= j) & (j < x.ranges[1, i]))
            def compute():
                logits, _, seen = _logits(
                    plan, x.numbers, x.key, query, columns, query_tokens, j, key_axis=0
                )
                weights = _where(seen, _weights(logits, rows[:1]) * rows[1:2], 0.0)
                dweights = _product(x.value[...], cotangent[...], transposed=True)
                # A hidden value may be too large for its product.
                dlogits = _where(seen, weights * (dweights - rows[2:]), 0.0)
                dkey_sum[...] += _product(dlogits, query[...])
                dvalue_sum[...] += _product(weights, cotangent[...])

        features = x.query.at[b, h], cotangent.at[b, h]
        per_token = x.query_tokens.at[b], rows.at[b, h]
        _over_tiles(step, ranges[0, j], ranges[1, j], plan.query_tile, features, per_token)

        @pl.when(g == group - 1)
        def store():
            dkey[...] = (dkey_sum[...] * x.numbers[0, 1]).astype(dkey.dtype)
            dvalue[...] = dvalue_sum[...].astype(dvalue.dtype)

    def own(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tile, dim), lambda b, k, j, g: (b, k, j, 0))

    def table(width: int) -> pl.BlockSpec:
        index_map = lambda b, k, j, g: (b, k * group + g, 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, 2, width), index_map, memory_space=pltpu.SMEM)

    specs = _specs(
        query=IN_HBM,
        key=own(head_dim),
        value=own(value_dim),
        numbers=pl.BlockSpec(
            (None, 1, 2), lambda b, k, j, g: (k * group + g, 0, 0), memory_space=pltpu.SMEM
        ),
        query_tokens=IN_HBM,
        key_tokens=pl.BlockSpec((None, x.key_tokens.shape[1], tile), lambda b, k, j, g: (b, 0, j)),
        ranges=table(x.ranges.shape[3]),
    )
    return pl.pallas_call(
        kernel,
        grid=(batch, key_heads, key_length // tile, group),
        in_specs=(specs, IN_HBM, IN_HBM, table(key_length // tile)),
        out_specs=(own(head_dim), own(value_dim)),
        out_shape=(
            jax.ShapeDtypeStruct(x.key.shape, dtype),
            jax.ShapeDtypeStruct(x.value.shape, dtype),
        ),
        scratch_shapes=[pltpu.VMEM((tile, n), jnp.float32) for n in (head_dim, value_dim)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",)
        ),
        interpret=INTERPRET,
        name="alibi_key_gradient",
    )(x, cotangent, rows, query_ranges(x.ranges, key_length // tile))


def query_ranges(ranges: Int[Array, "B H 2 nT"], num_keys: int) -> Int[Array, "B H 2 nS"]:
    """Return for each key tile the first query tile that needs it, and the one to stop before."""
    num_queries = ranges.shape[3]
    j, i = jnp.indices((num_keys, num_queries), dtype=ranges.dtype)[:, None, None]
    first, end = ranges[:, :, :1], ranges[:, :, 1:]
    needed = (first <= j) & (j < end)
    low = jnp.where(needed, i, num_queries).min(axis=3)
    high = jnp.where(needed, i + 1, 0).max(axis=3)
    return jnp.stack([jnp.minimum(low, high), high], axis=2)


# What a grid (batch, head, query tile) reads and writes

IN_HBM = pl.BlockSpec(memory_space=pl.ANY)  # the kernel fetches what it needs


def _features(tile: int, dim: int) -> pl.BlockSpec:
    """A query tile of [B, H, T, dim]."""
    return pl.BlockSpec((None, None, tile, dim), lambda b, h, i: (b, h, i, 0))


def _rows(tile: int, count: int) -> pl.BlockSpec:
    """A query tile of [B, H, count, T]."""
    return pl.BlockSpec((None, None, count, tile), lambda b, h, i: (b, h, 0, i))


def _specs(**specs: Any) -> Inputs:
    return Inputs(**specs)


def _of_query_tiles(plan: Plan, x: Inputs) -> Inputs:
    tokens, tiles = x.query_tokens.shape[1], x.ranges.shape[3]
    return _specs(
        query=_features(plan.query_tile, x.query.shape[3]),
        key=IN_HBM,
        value=IN_HBM,
        numbers=pl.BlockSpec((None, 1, 2), lambda b, h, i: (h, 0, 0), memory_space=pltpu.SMEM),
        query_tokens=pl.BlockSpec((None, tokens, plan.query_tile), lambda b, h, i: (b, 0, i)),
        key_tokens=IN_HBM,
        ranges=pl.BlockSpec(
            (None, None, 2, tiles), lambda b, h, i: (b, h, 0, 0), memory_space=pltpu.SMEM
        ),
    )


# Inside the kernels


def _logits(plan, numbers, own, other, own_tokens, other_tokens, key_tile, *, key_axis):
    """Return the tile's logits, signed distances, f32 and i32 [own, other], and which are seen.

    `own` is [own, D] with tokens [own, C], `other` [other, D] with tokens [C, other]; `key_axis`
    says which of the two are the keys of tile `key_tile`. The last is None if all are seen.
    """
    own, other, other_tokens = own[...], other[...], other_tokens[...]
    logits = _product(own, other, transposed=True) * numbers[0, 1]
    distance = own_tokens[:, :1] - other_tokens[:1]
    distance = distance if key_axis == 1 else -distance
    logits += distance_bias(numbers[0, 0][None], distance, kind="symmetric")[0]
    masks = []
    if plan.causal:
        masks.append(distance >= 0)
    if own_tokens.shape[1] > 1:
        masks.append(own_tokens[:, 1:] == other_tokens[1:])
    if plan.key_length % plan.key_tile:
        index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, key_axis)
        masks.append(index < plan.key_length - key_tile * plan.key_tile)
    return logits, distance, reduce(jnp.logical_and, masks) if masks else None


def _where(seen: Array | None, x: Array, hidden: float) -> Array:
    """Return x, but another number where a mask hides the key."""
    return x if seen is None else jnp.where(seen, x, hidden)


def _weights(logits: Array, largest: Array) -> Array:
    """Return exp(logit - largest), at most 1 though the forward pass may have rounded otherwise."""
    return jnp.exp(jnp.minimum(logits - largest, SLACK))


def _product(a: Array, b: Array, *, transposed: bool = False) -> Array:
    """Return a @ b, or a @ b.T, as float32, multiplied in the dtype of b."""
    exact = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a.astype(b.dtype),
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=exact if b.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _over_keys(step: Callable[..., None], plan: Plan, x: Inputs, heads: int) -> None:
    """Run `step(j, key, value, key_tokens)` over the key tiles of this query tile."""
    b, h, i = (pl.program_id(axis) for axis in range(3))
    k = jax.lax.div(h, heads // x.key.shape[1])
    features, per_token = (x.key.at[b, k], x.value.at[b, k]), (x.key_tokens.at[b],)
    _over_tiles(step, x.ranges[0, i], x.ranges[1, i], plan.key_tile, features, per_token)


def _over_tiles(
    step: Callable[..., None],
    first: Array,
    end: Array,
    tile: int,
    features: tuple[Any, ...],
    per_token: tuple[Any, ...],
) -> None:
    """Run `step(index, *tiles)` over tiles first to end, and fetch the next tile meanwhile.

    `features` are [length, D] and `per_token` [C, length], all in HBM. (`pltpu.emit_pipeline` does
    it too, but can only be traced where there is a TPU.)
    """
    sources = features + per_token
    shapes = [(tile, x.shape[1]) for x in features] + [(x.shape[0], tile) for x in per_token]

    def run(semaphores: Any, *buffers: Any) -> None:
        def copies(index: Array, slot: Array | int) -> list[Any]:
            along = pl.ds(pl.multiple_of(index * tile, tile), tile)
            parts = [x.at[along] for x in features] + [x.at[:, along] for x in per_token]
            return [
                pltpu.make_async_copy(part, buffer.at[slot], semaphores.at[n, slot])
                for n, (part, buffer) in enumerate(zip(parts, buffers, strict=True))
            ]

        @pl.when(first < end)
        def fetch_first():
            for copy in copies(first, 0):
                copy.start()

        @pl.loop(first, end)
        def over(index):
            slot = jax.lax.rem(index - first, 2)

            @pl.when(index + 1 < end)
            def fetch_next():
                for copy in copies(index + 1, 1 - slot):
                    copy.start()

            for copy in copies(index, slot):
                copy.wait()
            step(index, *(buffer.at[slot] for buffer in buffers))

    pl.run_scoped(
        run,
        pltpu.SemaphoreType.DMA((len(sources), 2)),
        *(pltpu.VMEM((2, *s), x.dtype) for s, x in zip(shapes, sources, strict=True)),
    )
