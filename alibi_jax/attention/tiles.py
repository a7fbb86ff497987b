"""Which tiles of keys can matter: the rule that stops the cost of attention growing with length.

Queries and keys are cut into tiles. `key_ranges` gives, for each head and query tile, the range of
key tiles to compute. What is outside takes at most `tolerance` of the probability of any row.

Proof. Take a head and write `x_ij = q_i.k_j + b_ij` for the logit of query i, the scale included in
it, at key j, with b_ij the bias: `-m * d_ij` at distance d_ij for ALiBi with slope m. Write
`lse_i = log sum_j e^x_ij` over the keys that i sees: those that no mask hides, be it causality,
segments or a window. A set X of them has the probability `sum_{j in X} e^x_ij / e^lse_i`.

1. Centring. Replacing every key k_j by `k_j - c` takes the same `q_i.c` from every logit of row i,
   hence from `lse_i`, and changes no probability. Let c be the mean of the keys that some query may
   see (what a cache has no token for yet is none): logits of trained models have a large common
   part, which would spoil step 2. From here on keys are centred, and there are no others.
2. From above. Let `K_J` be the largest |k_j| of key tile J, which has n_J keys, and `U_IJ` at least
   as large as every b_ij of query tile I and J. By Cauchy-Schwarz, every i in I gives J at most
   the weight `n_J * e^(|q_i| K_J + U_IJ)`. With `d_IJ` the least distance between the tiles, U_IJ
   is `-m d_IJ` for ALiBi. Any function of distance comes with its own bound, at least b(d) at every
   d >= d_IJ, for no bias needs to fall everywhere. For `c_i - c_j` it is the largest c_i of I less
   the smallest c_j of J: no distance is needed, nor that c falls.
3. From below. `lse_i` is at least the log-sum-exp over *some* of the keys that i sees. Take its
   own block of `NEAR` keys and the block before it, and compute that sum L_i exactly, with the
   bias itself.
4. Hence J takes at most `e^u_IJ` of the probability of any row of I, where

       u_IJ = log n_J + U_IJ + max_i (|q_i| K_J - L_i),

   or 0 if positions, segments or the window let no row of I see a key of J. The tiles left out at
   the left are the longest prefix with `sum_J e^u_IJ <= tolerance / 2`, those at the right the
   longest such suffix. Together they take at most `tolerance`. QED

Dropping the fraction t of a row and normalising the rest moves the output by
`|sum_kept (p / (1-t) - p) v| + |sum_dropped p v| <= t max|v| + t max|v|`.

A bias without a bound has U_IJ = inf, and only what no row sees is left out. With a sink, the first
key is at distance 0 from all, and no window hides it. So tile 0 is always computed, beside a range
that starts after it, and never counted among what is left out; step 3 holds, since the sum with
more penalty on one key, or without that key, is smaller.

All terms are float32, so each u_IJ is raised by `ROUNDING` times the size of its parts. A row
that sees none of its near keys has L_i = -inf, and then only unseen tiles are left out. The cost is
that of logits at `2 * NEAR` keys a row, and of one number a row and key tile, reduced at once to
a table of (T / tile) * (S / tile).

Where sequences are divided over devices, each has its own queries and the rows of its table. Of
other devices' keys that takes c, the K_J and the limits of each tile's positions and segments: a
few numbers a tile, which are gathered. Step 3 holds for any keys that i sees. They are its own
device's and, for the first block, the last of the device to the left.

The gradients of query, key and value leave out the same small weights. That of a slope weighs them
with their distance, and is off by about `tolerance * log(1 / tolerance)` of its own size at worst.

The bound by norms and a span is that of adaptive computation pruning for the Forgetting Transformer
(Lin et al., arXiv:2504.06949); it takes -U for `lse_i`, where steps 1 and 3 are ours.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from alibi_jax.attention.biases import Bias, has_sink
from alibi_jax.attention.nonfinite import finite_rows
from alibi_jax.bias import distances
from alibi_jax.typing import Key, Query, Value

NEAR = 32
EXACT = jax.lax.Precision.HIGHEST  # float32 products would be of 16 bits on a TPU otherwise
# By how much a logit of the backward pass may exceed the largest of the forward pass. At 0 the
# largest weights would be rounded down more often than up; without a bound logits of 10^8 are off
# by several units, and weights by as many powers of e.
SLACK = 1e-3
ROUNDING = 3e-5  # twice what float32 sums of 256 products can be off by, of the norms
LEAST = 1e-30  # of norms, whose products with an infinite one must not be NaN


class Plan(NamedTuple):
    """What is static: the kind of mask, the number of keys without padding, the sizes of tiles."""

    causal: bool
    key_length: int
    query_tile: int
    key_tile: int
    sink: bool = False  # the first key is at distance 0 from all
    step: int = 0  # keys to take at a time, for an implementation that takes several tiles


class Tokens(NamedTuple):
    """Where the tokens stand, which decides who sees whom: the window is a scalar, or None."""

    query_positions: Int[Array, "#B T"]
    key_positions: Int[Array, "#B S"]
    segment_ids: Int[Array, "B T"] | None
    key_segment_ids: Int[Array, "B S"] | None
    window: Int[Array, ""] | None = None


class Stats(NamedTuple):
    """The softmax of each row, in two numbers: their log-sum-exp alone would round large logits.

    A row that sees no key has an infinite `largest` and a `total` of 1. One that is not finite, for
    it sees a NaN, has a `total` that is not.
    """

    largest: Float[Array, "B H T"]  # of the row's logits
    total: Float[Array, "B H T"]  # the sum of exp(logit - largest)


def key_ranges(
    query: Query,
    key: Key,
    bias: Bias,
    scale: Float[Array, ""],
    *,
    causal: bool,
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    window: Int[Array, ""] | None = None,
    tolerance: float,
    query_tile: int,
    key_tile: int,
    axis: str | None = None,
    value: Value | None = None,
) -> tuple[Int[Array, "B H nT"], Int[Array, "B H nT"]]:
    """Return the first key tile to compute and the one to stop before, for each query tile.

    Args:
      query: floating [B, T, H, D]; all arguments are as in `alibi_jax.attention`.
      key: floating [B, S, K, D].
      bias: of the dtype to compute in.
      scale: factor of `query.key`, of that dtype.
      causal: whether keys after the query are hidden.
      query_positions: [1, T] or [B, T].
      key_positions: [1, S] or [B, S].
      segment_ids: None, or both kinds of ids.
      key_segment_ids: see `segment_ids`.
      window: None, or the distance from which on keys are hidden.
      tolerance: probability that may be left out of a row; 0 leaves out what no row sees.
      query_tile: queries a tile; the last tile may be shorter.
      key_tile: keys a tile.
      axis: the mesh axis of a surrounding `jax.shard_map` that sequences are divided over, if any.
        T and S are then those of one device, and n devices have the key tiles of each one after
        those of the one before, n * ceil(S / key_tile) in all.
      value: floating [B, S, K, Dv], of which it only matters whether it is finite; None: it is, or
        its keys are NaN where it is not.

    Returns:
      i32[B, H, ceil(T / query_tile)] twice, `0 <= first <= end`, and end at most the number of key
      tiles, ceil(S / key_tile) or that of all devices. With a sink, first is at least 1: tile 0 is
      to be computed before the range.
    """
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    dtype, sink = scale.dtype, has_sink(bias)
    log_half = math.log(tolerance) - math.log(2) if tolerance > 0 else -math.inf

    def of_all(x: Array) -> Array:
        """Return key tiles, the last axis, of all devices."""
        return x if axis is None else jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)

    # XLA would compute at compile time, and slowly, all that follows from positions that it knows.
    query_positions, key_positions = jax.lax.optimization_barrier((query_positions, key_positions))
    # What fits int32 is the difference of any query and any key, not of two queries or two keys,
    # and positions may wrap round. So those of queries count from a key, and those of keys from a
    # query: in that order they have minima and maxima.
    origins = query_positions[:, :1], key_positions[:, :1]
    if axis is not None:
        origins = jax.tree.map(lambda x: jax.lax.all_gather(x, axis)[0], origins)
    apart = origins[1] - origins[0]
    from_key, from_query = query_positions - origins[1], key_positions - origins[0]

    def of_any(of_queries: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the smallest and the largest of the queries of all devices."""
        if axis is None:
            return of_queries
        return jax.lax.pmin(of_queries[0], axis), jax.lax.pmax(of_queries[1], axis)

    # All that the table needs of keys: [B, K, nS], and limits [B, nS] or [1, nS].
    visible, _ = _sight(
        of_any(_limits(from_key, length)),
        (from_query, from_query),
        apart,
        causal=causal,
        window=window,
    )
    if segment_ids is not None and key_segment_ids is not None:
        visible &= _meet(of_any(_limits(segment_ids, length)), (key_segment_ids, key_segment_ids))
    visible = visible.swapaxes(1, 2)  # [B, S, 1]
    wide = key.astype(dtype)
    norms = jnp.linalg.norm(wide, axis=-1)
    # Those that are not finite must be met by all who see them, and are no part of the mean.
    bounded = jnp.isfinite(norms)
    if value is not None:
        bounded &= finite_rows(value)
    counted = visible & bounded
    total = jnp.where(counted[..., None], wide, 0.0).sum(axis=1)
    count = counted.sum(axis=1, dtype=dtype)
    loudest = jnp.where(counted, norms, 0.0).max(axis=1)
    if axis is not None:
        total, count = jax.lax.psum((total, count), axis)
        loudest = jax.lax.pmax(loudest, axis)
    center = total / jnp.maximum(count, 1.0)[..., None]
    deviation = jnp.linalg.norm(wide - center[:, None], axis=-1)
    deviation = jnp.where(counted, deviation, jnp.where(visible, jnp.inf, 0.0)).swapaxes(1, 2)
    largest = of_all(jnp.maximum(_tiles(deviation, key_tile).max(axis=-1), LEAST))
    position_limits = [of_all(x) for x in _limits(from_query, key_tile)]
    segment_limits = None
    if key_segment_ids is not None:
        segment_limits = [of_all(x) for x in _limits(key_segment_ids, key_tile)]

    if axis is not None:
        key, key_positions = _after_its_left(key, axis), _after_its_left(key_positions, axis)
        if key_segment_ids is not None:
            key_segment_ids = _after_its_left(key_segment_ids, axis)

    def one_head(index: Array) -> tuple[Array, Array]:
        b, h = index // heads, index % heads
        # Positions are [1, T] or [B, T]; indexing clamps.
        q_pos, k_pos = query_positions[b], key_positions[b]
        segments = None
        if segment_ids is not None and key_segment_ids is not None:
            segments = segment_ids[b], key_segment_ids[b]

        seen, distance = _sight(
            _limits(from_key[b], query_tile),
            [x[b] for x in position_limits],
            apart[b],
            causal=causal,
            window=window,
        )
        if segments is not None and segment_limits is not None:
            seen &= _meet(_limits(segments[0], query_tile), [x[b] for x in segment_limits])

        if bias.bounded:
            above = weight_bound(b, h, q_pos, k_pos, segments, distance)
        else:
            above = jnp.full(seen.shape, jnp.inf, dtype)
        # -inf where unseen, +inf where nothing bounds the keys or nothing is known from below.
        share = jnp.exp(jnp.minimum(jnp.where(seen, above - log_half, -jnp.inf), 1.0))
        if sink:
            share = share.at[:, 0].set(0.0)
        # Sums of up to e each; of 1, a hundredth is left for their rounding.
        left = jax.lax.cumsum(share, axis=1) <= 0.99
        right = jax.lax.cumsum(share, axis=1, reverse=True) <= 0.99
        first = left.sum(axis=1, dtype=jnp.int32)
        end = jnp.maximum(share.shape[1] - right.sum(axis=1, dtype=jnp.int32), int(sink))
        return jnp.minimum(first, end), end

    def weight_bound(b, h, q_pos, k_pos, segments, distance) -> Array:
        """Return u_IJ [nT, nS], the log of the most probability that a tile can have of a row."""
        q, k = query[b, :, h].astype(dtype) * scale, key[b, :, h // group].astype(dtype)
        of_head = jax.tree.map(lambda x: x[h], bias.parts.heads)
        of_queries, of_keys = jax.tree.map(
            lambda x: x[b, :, h], (bias.parts.queries, bias.parts.keys)
        )

        norms = jnp.maximum(_or_infinite(jnp.linalg.norm(q, axis=1)), LEAST)
        shift = jnp.matmul(q, center[b, h // group], precision=EXACT)
        near_bias = partial(bias.at, of_head)
        near = _near(
            q,
            k,
            near_bias,
            (of_queries, of_keys),
            (q_pos, k_pos),
            segments,
            window,
            causal=causal,
        )
        rounding = ROUNDING * (jnp.abs(near) + 2 * norms * loudest[b, h // group])
        below = near - shift - rounding
        below = jnp.where(jnp.isfinite(below), below, -jnp.inf)

        # max over i of |q_i| K_J - L_i, [nT, nS]
        norms, below = (_tiles(x, query_tile) for x in (norms, below))
        content = (1 + ROUNDING) * norms[:, :, None] * largest[b, h // group][None, None]
        content = jnp.max(content - below[:, :, None], axis=1)

        of_queries = jax.tree.map(partial(_tiles, tile=query_tile), of_queries)
        of_keys = jax.tree.map(partial(_tiles, tile=key_tile), of_keys)
        most = bias.most(of_head, of_queries, of_keys, distance)
        return _or_infinite(math.log(key_tile) + content + most + ROUNDING * jnp.abs(most))

    first, end = jax.lax.map(one_head, jnp.arange(batch * heads))
    return first.reshape(batch, heads, -1), end.reshape(batch, heads, -1)


def _or_infinite(x: Array) -> Array:
    """Return x with +inf for NaN, which a maximum on a CPU may pass over."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _tiles(x: Array, tile: int) -> Array:
    """Split the last axis into tiles [..., n, tile], filled with copies of the last entry."""
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % tile)], mode="edge")
    return filled.reshape(*x.shape[:-1], -1, tile)


def _limits(x: Int[Array, "*B L"], tile: int) -> tuple[Array, Array]:
    """Return the smallest and the largest of each tile."""
    tiles = _tiles(x, tile)
    return tiles.min(axis=-1), tiles.max(axis=-1)


def _sight(
    of_queries: Sequence[Array],
    of_keys: Sequence[Array],
    apart: Int[Array, "*B 1"],
    *,
    causal: bool,
    window: Int[Array, ""] | None,
) -> tuple[Bool[Array, "*B n m"], Int[Array, "*B n m"]]:
    """Return whether queries may see keys, and the least distance, by limits of their positions.

    Limits are the smallest and the largest of each group of queries, [..., n], and keys, [..., m],
    and `apart` is how far after that of keys the origin of queries is.
    """
    low_q, high_q = (x[..., :, None] for x in of_queries)
    low_k, high_k = (x[..., None, :] for x in of_keys)
    apart = apart[..., None]
    before = low_q - high_k + apart  # at least this far to the left of the queries
    after = low_k - high_q - apart
    distance = jnp.maximum(jnp.maximum(before, after), 0)
    seen = after <= 0 if causal else jnp.ones_like(after, bool)
    if window is not None:
        seen &= distance < window
    return seen, distance


def _meet(of_queries: Sequence[Array], of_keys: Sequence[Array]) -> Bool[Array, "*B n m"]:
    """Return whether queries and keys may have a segment in common, by the limits of their ids."""
    low_q, high_q = (x[..., :, None] for x in of_queries)
    low_k, high_k = (x[..., None, :] for x in of_keys)
    return (low_q <= high_k) & (low_k <= high_q)


def _after_its_left(x: Array, axis: str) -> Array:
    """Return [B, L, ...] after the last block of the device to the left, of the last for the first.

    (Keys of the last device are ones that the first queries see, or that their positions hide.)
    """
    count = jax.lax.axis_size(axis)
    to_right = [(i, (i + 1) % count) for i in range(count)]
    return jnp.concatenate([jax.lax.ppermute(x[:, -NEAR:], axis, to_right), x], axis=1)


def _near(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    bias: Callable[..., Array],
    parts: tuple[Any, Any],
    positions: tuple[Int[Array, "T"], Int[Array, "S"]],
    segments: tuple[Array, Array] | None,
    window: Int[Array, ""] | None,
    *,
    causal: bool,
) -> Float[Array, "T"]:
    """Return the log-sum-exp of each row over its own block of keys and the one before.

    Row i stands at key i + S - T, as the default positions have it, or so that the last row stands
    at the last key of its position and segment: queries may be in the middle of keys, as in a cache
    that is not full. Where positions put others elsewhere, the sum is over other keys that they
    see, or none: less tight, and as true.

    Args:
      q: queries, times the scale.
      k: keys.
      bias: the bias of this head, as `at` of `alibi_jax.attention.biases` without its first.
      parts: what belongs to queries and to keys, leaves [T] and [S].
      positions: of queries and of keys.
      segments: ids of queries and of keys, or None.
      window: the distance from which on keys are hidden, or None.
      causal: whether later keys are hidden.
    """
    (length, _), key_length = q.shape, len(k)
    count = -(-length // NEAR)
    start: Any = key_length - length
    if start != 0:
        own = positions[1] == positions[0][-1]
        if segments is not None:
            own &= segments[1] == segments[0][-1]
        after = jnp.argmax(own[::-1]).astype(jnp.int32)  # of several such keys, the last
        start = jnp.where(own.any(), key_length - after - length, start)
    index = start - NEAR + jnp.arange((count + 1) * NEAR, dtype=jnp.int32)

    def of_queries(x: Array) -> Array:
        padded = jnp.pad(x, [(0, count * NEAR - length)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, NEAR, *x.shape[1:])

    def of_keys(x: Array) -> Array:
        """Return [count, 2 * NEAR, ...]: for each block of queries its own and the one before."""
        if length == key_length:  # a copy, which takes less than looking up
            x = jnp.pad(x, [(NEAR, count * NEAR - length)] + [(0, 0)] * (x.ndim - 1))
        else:
            x = x.at[index].get(mode="clip")
        blocks = x.reshape(count + 1, NEAR, *x.shape[1:])
        return jnp.concatenate([blocks[:-1], blocks[1:]], axis=1)

    signed = distances(of_queries(positions[0]), of_keys(positions[1]))
    distance = jnp.abs(signed)
    logits = jnp.einsum("nrd,nsd->nrs", of_queries(q), of_keys(k), precision=EXACT)
    logits += jax.vmap(bias)(
        jax.tree.map(lambda x: of_queries(x)[:, :, None], parts[0]),
        jax.tree.map(lambda x: of_keys(x)[:, None, :], parts[1]),
        distance,
        of_queries(positions[0])[:, :, None],
    )
    exists = ((index >= 0) & (index < key_length)).reshape(count + 1, NEAR)
    seen = jnp.concatenate([exists[:-1], exists[1:]], axis=1)[:, None, :]
    if causal:
        seen &= signed >= 0
    if window is not None:
        seen &= distance < window
    if segments is not None:
        seen &= of_queries(segments[0])[:, :, None] == of_keys(segments[1])[:, None, :]
    logits = jnp.where(seen, logits, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=-1).reshape(-1)[:length]
