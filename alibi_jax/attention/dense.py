"""Dense attention: the readable truth. It holds all logits, so it is for tests and short inputs.

Softmax over `scale * query.key + bias`, which for ALiBi is `scale * query.key - slope * distance`
(Press, Smith, Lewis, ICLR 2022, section 3).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alibi_jax.attention.biases import Bias, with_sink
from alibi_jax.attention.nonfinite import finite_rows, replaced
from alibi_jax.bias import distances, float_dtype
from alibi_jax.typing import (
    Attended,
    Key,
    KeyPositions,
    Query,
    QueryPositions,
    SegmentIds,
    Value,
)


def dense(
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
    tolerance: float | None,
) -> Attended:
    """Compute `alibi_jax.attention`; the arguments are as that function checks and fills them.

    Positions are [1, T] or [B, T], and [1, S] or [B, S]; both segment ids are given, or neither.
    """
    del tolerance  # Nothing is skipped, which satisfies any tolerance.
    batch, length, heads, head_dim = query.shape
    key_heads = key.shape[2]
    group = heads // key_heads
    dtype = float_dtype(query.dtype)

    # Query head h = k * G + g reads key head k. The G * T queries of a key head are the rows of one
    # matrix: XLA's CPU backend multiplies these several times faster than it does [B, T, K, G, D].
    # Splitting the head axis, rather than repeating keys, also keeps its sharding.
    rows = query.reshape(batch, length, key_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
    # Said, since a reshape forgets the sharding of an axis of size 1, such as a batch of one.
    placed = jax.typeof(keys).sharding
    rows = rows.reshape(batch, key_heads, group * length, head_dim, out_sharding=placed)
    # In a product a NaN would reach what a mask hides: see `alibi_jax.attention.nonfinite`.
    fine_keys = finite_rows(keys) & finite_rows(values)
    known = finite_rows(rows)[:, :, :, None] & fine_keys[:, :, None, :]
    rows, keys, values = (replaced(x, ~jnp.isfinite(x), 0.0) for x in (rows, keys, values))
    logits = jnp.einsum("bkrd,bksd->bkrs", rows, keys, preferred_element_type=dtype)
    logits += jnp.where(known, jnp.zeros((), dtype), jnp.nan)
    logits = logits.reshape(batch, key_heads, group, length, -1).reshape(batch, heads, length, -1)
    logits *= jnp.asarray(scale, dtype)

    # The method, and all of it: one bias a head, added after the scale.
    signed = distances(query_positions, key_positions)
    distance = with_sink(bias, jnp.abs(signed))
    logits += bias.dense(distance, jnp.asarray(query_positions))

    seen = signed >= 0 if causal else jnp.ones_like(signed, bool)
    if window is not None:
        seen &= distance < window
    if segment_ids is not None and key_segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == key_segment_ids[:, None, :])
    seen = seen[:, None]
    weights, fine = _softmax(jnp.where(seen, logits, -jnp.inf))
    weights = jnp.where(seen, weights, 0.0).astype(value.dtype)
    rows = weights.reshape(batch, key_heads, group, length, -1)
    rows = rows.reshape(batch, key_heads, group * length, keys.shape[2], out_sharding=placed)
    output = jnp.einsum("bkrs,bksd->bkrd", rows, values, preferred_element_type=dtype)
    output = output.reshape(batch, key_heads, group, length, -1).transpose(0, 3, 1, 2, 4)
    output = output.reshape(batch, length, heads, -1).astype(query.dtype)
    # Chosen, so that the cotangent of such a row, which may be NaN, reaches no hidden value.
    return jnp.where(fine.swapaxes(1, 2), output, jnp.nan)


def _softmax(
    logits: Float[Array, "*B S"],
) -> tuple[Float[Array, "*B S"], Bool[Array, "*B 1"]]:
    """Softmax over the last axis, and whether there is one; -inf throughout gives zeros."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total), ~jnp.isnan(total)
