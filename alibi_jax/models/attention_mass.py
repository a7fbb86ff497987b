"""How far back attention looks: its probability by distance, without the logits of all queries."""

import itertools

import jax
import jax.numpy as jnp

from alibi_jax.attention.biases import Bias, LinearBias, Prefix, PrefixBias, with_sink
from alibi_jax.typing import Array, Float, Key, Query, Slopes

# Logits at once: 64 MB in float32.
LOGITS_AT_ONCE = 1 << 24


def mass_by_distance(
    query: Query,
    key: Key,
    bias: Slopes | Bias,
    *,
    scale: float,
    edges: tuple[int, ...],
    num_queries: int,
) -> Float[Array, "B H N"]:
    """Mean attention probability of the last queries in each range of distances.

    Args:
      query: [B, T, H, D].
      key: [B, T, K, D].
      bias: as `alibi_jax.attention` takes it, for these T queries and keys; causal.
      scale: factor of query.key.
      edges: rising distances, above 0.
      num_queries: how many, at most T.

    Returns:
      f32[B, H, len(edges) + 1]: at distances [0, edges[0]), [edges[0], edges[1]), ..., and from
      the last edge on. They add up to 1.
    """
    batch, length, heads, _ = query.shape
    bias = LinearBias(bias) if isinstance(bias, jax.Array) else bias
    size = max(1, min(num_queries, LOGITS_AT_ONCE // (batch * heads * length)))
    num_chunks = -(-num_queries // size)
    key_positions = jnp.arange(length, dtype=jnp.int32)
    grouped = key.shape[2]

    def chunk(rows: Array) -> Array:
        """Sums over the queries of `rows`, i32[size]; those beyond the last count as nothing."""
        counts = rows < length
        rows = jnp.minimum(rows, length - 1)
        of_rows = _of_queries(bias, rows)
        some = query[:, rows].reshape(batch, size, grouped, heads // grouped, -1)
        logits = jnp.einsum("bqkgd,bskd->bkgqs", some, key, preferred_element_type=jnp.float32)
        logits = scale * logits.reshape(batch, heads, size, length)
        distance = rows[:, None] - key_positions[None, :]
        penalised = with_sink(bias, jnp.maximum(distance, 0)[None])
        logits += of_rows.dense(penalised, rows[None])
        logits = jnp.where(distance[None, None] >= 0, logits, -jnp.inf)
        probability = jnp.where(counts[None, None, :, None], jax.nn.softmax(logits, axis=-1), 0.0)
        limits = (0, *edges, length + 1)
        ranges = [(low <= distance) & (distance < high) for low, high in itertools.pairwise(limits)]
        sums = [jnp.sum(jnp.where(r[None, None], probability, 0.0), (2, 3)) for r in ranges]
        return jnp.stack(sums, axis=-1)

    rows = length - num_queries + jnp.arange(num_chunks * size, dtype=jnp.int32)
    rows = rows.reshape(num_chunks, size)
    return jnp.sum(jax.lax.map(chunk, rows), axis=0) / num_queries


def _of_queries(bias: Bias, rows: Array) -> Bias:
    if not isinstance(bias, PrefixBias):
        return bias
    return PrefixBias(Prefix(*(sums[:, rows] for sums in bias.query)), bias.key)
