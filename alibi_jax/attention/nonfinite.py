"""NaN and infinity: what no row sees must not matter, and what a row sees must show.

A mask gives a key the weight 0, but `0 * nan` is nan: a product over keys would carry what one of
them holds into rows that do not see it, and a product over rows into keys that they do not see.
So products only ever get finite numbers, and what is not finite goes the way of the logits, which
masks are chosen over: a key or a value that is not finite becomes a NaN key (`as_nan_keys`), whose
logits are NaN wherever it is seen, and makes the whole row NaN.

The backward pass has the same rule for rows: one that is NaN, or whose cotangent is, has NaN
weights for the keys that it sees, and all other inputs are finite (`for_gradients`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from alibi_jax.attention.tiles import Stats
from alibi_jax.typing import Attended, Key, Query, Value


def as_nan_keys(key: Key, value: Value) -> tuple[Key, Value]:
    """Return keys and values where all that is not finite is in keys, and those are all NaN.

    Args:
      key: floating [B, S, K, D].
      value: floating [B, S, K, Dv].

    Returns:
      The same, but where a key head of a token has any number in either that is not finite its key
      is NaN and its value 0. Gradients are those of the identity.
    """
    wrong = ~(finite_rows(key) & finite_rows(value))
    return replaced(key, wrong[..., None], jnp.nan), replaced(value, wrong[..., None], 0.0)


def finite_rows(x: Float[Array, "*B D"]) -> Bool[Array, "*B"]:
    """Return whether all numbers of a row are finite."""
    return jnp.isfinite(x).all(axis=-1)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def replaced(x: Array, where: Bool[Array, "..."], by: float) -> Array:
    """Return x with a number in some places, and the derivative of the identity."""
    return jnp.where(where, jnp.asarray(by, x.dtype), x)


@replaced.defjvp
def _replaced_jvp(by: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return replaced(*primals, by), tangents[0]


def for_gradients(
    query: Query, key: Key, cotangent: Attended, stats: Stats
) -> tuple[Query, Key, Attended, Stats]:
    """Return what a backward pass computes with: finite arrays, and in `stats` what is not.

    Args:
      query: floating [B, T, H, D].
      key: [B, S, K, D], of `as_nan_keys`.
      cotangent: of the output, [B, T, H, Dv].
      stats: of the forward pass, [B, H, T].

    Returns:
      The same, with 0 for what is not finite. The `largest` of a row is NaN where its query, its
      cotangent or its softmax is not finite, and so are then its weights `exp(logit - largest)`:
      choose 0 for hidden keys over them.
    """
    fine = (finite_rows(query) & finite_rows(cotangent)).swapaxes(1, 2) & jnp.isfinite(stats.total)
    stats = Stats(jnp.where(fine, stats.largest, jnp.nan), jnp.where(fine, stats.total, 1.0))
    query, key, cotangent = (jnp.where(jnp.isfinite(x), x, 0) for x in (query, key, cotangent))
    return query, key, cotangent, stats
