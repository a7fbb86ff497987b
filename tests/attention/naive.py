"""Attention in float64, row by row, and inputs to compare it on."""

import jax.numpy as jnp
import numpy as np


def naive_weights(
    query,
    key,
    bias,
    causal=True,
    scale=None,
    positions=None,
    segments=None,
    window=None,
    sink=False,
) -> np.ndarray:
    """Weights [B, H, T, S], row by row in float64; positions, segments are (query, key) pairs.

    A bias is an array of slopes, or a function of batch entry, head and row, and of the distance
    to each key and the query's position, that gives the row's bias.
    """
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    if not callable(bias):
        slopes = np.asarray(bias, np.float64)

        def bias(b, h, t, distance, position):
            return -slopes[h] * distance

    (batch, length, heads, head_dim), (key_length, key_heads) = query.shape, key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    if positions is None:
        positions = (np.arange(length) + key_length - length, np.arange(key_length))
    query_positions, key_positions = (
        np.broadcast_to(np.asarray(p, np.int64), (batch, np.shape(p)[-1])) for p in positions
    )
    weights = np.zeros((batch, heads, length, key_length))
    for b, h, t in np.ndindex(batch, heads, length):
        distance = np.abs(query_positions[b, t] - key_positions[b])
        if sink:
            distance[0] = 0
        seen = np.ones(key_length, bool)
        if causal:
            seen &= key_positions[b] <= query_positions[b, t]
        if window is not None:
            seen &= distance < window
        if segments is not None:
            seen &= np.asarray(segments[1])[b] == np.asarray(segments[0])[b, t]
        content = scale * key[b, :, h // (heads // key_heads)] @ query[b, t, h]
        logits = (content + bias(b, h, t, distance, query_positions[b, t]))[seen]
        if seen.any():
            unnormalised = np.exp(logits - logits.max())
            weights[b, h, t, seen] = unnormalised / unnormalised.sum()
    return weights


def naive_attention(query, key, value, bias, **kwargs) -> np.ndarray:
    weights = naive_weights(query, key, bias, **kwargs)
    group = weights.shape[1] // value.shape[2]
    value = np.repeat(np.asarray(value, np.float64), group, axis=2)
    return np.einsum("bhts,bshd->bthd", weights, value)


def inputs(
    seed=0, *, batch=2, length=6, key_length=None, heads=4, key_heads=None, dim=8, value_dim=None
):
    """Query, key, value and slopes. The queries are large, so that a wrong scale shows."""
    rng = np.random.default_rng(seed)
    keys = (batch, key_length or length, key_heads or heads)
    return (
        jnp.asarray(2 * rng.normal(size=(batch, length, heads, dim)), jnp.float32),
        jnp.asarray(rng.normal(size=(*keys, dim)), jnp.float32),
        jnp.asarray(rng.normal(size=(*keys, value_dim or dim)), jnp.float32),
        jnp.asarray(rng.uniform(0.05, 1.5, heads), jnp.float32),
    )


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, atol=atol, rtol=1e-5)
