"""NaN and infinity: what no row sees must not matter, and what a row sees must show.

A mask gives a key the weight 0, but `0 * nan` is nan: a product over keys would carry what one of
them holds into rows that do not see it, and a product over rows into keys that they do not see.
So products only ever get finite numbers, and what is not finite goes the way of the logits, which
masks are chosen over: a key or a value that is not finite becomes a NaN key (`as_nan_keys`), whose
logits are NaN wherever it is seen, and makes the whole row NaN.

The backward pass has the same rule for rows: one that is NaN, or whose cotangent is, has NaN
weights for the keys that it sees, and all other inputs are finite (`finite_for_gradients`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def as_nan_keys(
    key: Float[Array, "*B D"], value: Float[Array, "*B Dv"]
) -> tuple[Float[Array, "*B D"], Float[Array, "*B Dv"]]:
    """Return keys and values where all that is not finite is in keys, and those are all NaN.

    Args:
      key: floating [*B, D].
      value: floating [*B, Dv].

    Returns:
      The same, but where any number in either is not finite the key is NaN throughout and the value
      0. Gradients are those of the identity.
    """
    wrong = ~(finite_rows(key) & finite_rows(value))
    return replaced(key, wrong[..., None], jnp.nan), replaced(value, wrong[..., None], 0.0)


def as_nan_rows(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Return x where a row that is not finite is NaN throughout: of infinity a logit may be -inf.

    Gradients are those of the identity.
    """
    return replaced(x, ~finite_rows(x)[..., None], jnp.nan)


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


def finite(x: Array) -> Array:
    """Return x with 0 for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def finite_for_gradients(
    query: Float[Array, "*B D"], cotangent: Float[Array, "*B Dv"], largest: Array, total: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the rows that a backward pass computes with: all finite but for `largest`.

    Args:
      query: of each row, as the model gave it.
      cotangent: of each row's output.
      largest: of the row's logits, [*B]: see `alibi_jax.attention.tiles.Stats`.
      total: the sum of exp(logit - largest), [*B].

    Returns:
      The same, with 0 for what is not finite. `largest` is NaN where the query, the cotangent or
      the softmax of a row is not finite, and so are then its weights `exp(logit - largest)`: for
      hidden keys choose 0 over them. Doing this twice does no more than once.
    """
    fine = finite_rows(query) & finite_rows(cotangent) & jnp.isfinite(total)
    largest, total = jnp.where(fine, largest, jnp.nan), jnp.where(fine, total, 1.0)
    return finite(query), finite(cotangent), largest, total
