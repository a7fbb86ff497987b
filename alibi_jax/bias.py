"""The method itself: slopes, the linear bias, and how far a head can see.

ALiBi (Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, section 3) adds to each attention
logit, after the 1/sqrt(D) scale (footnote 10), one thing: `-slope * distance`. Nothing is learned.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alibi_jax.typing import Bias, KeyPositions, QueryPositions, Slopes

KINDS = ("causal", "symmetric", "asymmetric")
RULES = ("reference", "geometric")
NEVER = np.iinfo(np.int32).max  # the horizon of a head from which nothing can be dropped


def slopes(num_heads: int, *, rule: str = "reference", bias_max: float = 8.0) -> Slopes:
    """Return the slope of each head, in nats per position.

    Args:
      num_heads: number of query heads H, at least 1.
      rule: "reference" is the authors' `get_slopes`, which BLOOM and MPT follow: with p the largest
        power of two up to H, `2^(-bias_max*k/p)` for k = 1..p, then every other member of the same
        sequence for 2p heads until there are H. It is not sorted: weights depend on the order.
        "geometric" is the formula of the paper's section 3, `2^(-bias_max*k/H)` for k = 1..H. The
        two agree when H is a power of two.
      bias_max: minus the base-2 logarithm of the smallest slope; 8 in the paper (MPT's
        `alibi_bias_max`).

    Returns:
      f32[H], computed in float64 and rounded once.

    Raises:
      TypeError: `num_heads` is not an integer.
      ValueError: `num_heads`, `rule` or `bias_max` is out of range.
    """
    if isinstance(num_heads, bool):
        raise TypeError(f"num_heads must be an integer, got {num_heads}")
    try:
        num_heads = operator.index(num_heads)
    except TypeError as error:
        raise TypeError(f"num_heads must be an integer, got {num_heads!r}") from error
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    if not 0 < bias_max < math.inf:
        raise ValueError(f"bias_max must be positive and finite, got {bias_max}")

    def sequence(n: int) -> np.ndarray:
        return 2.0 ** (-bias_max * np.arange(1, n + 1) / n)

    if rule == "geometric":
        values = sequence(num_heads)
    else:
        power = 2 ** (num_heads.bit_length() - 1)
        values = np.concatenate([sequence(power), sequence(2 * power)[::2][: num_heads - power]])
    return jnp.asarray(values.astype(np.float32))


def bias(
    slopes: Slopes | Float[Array, "2 H"],
    query_positions: QueryPositions | Float[Array, "*B T 2"],
    key_positions: KeyPositions | Float[Array, "*B S 2"],
    *,
    kind: str = "causal",
) -> Bias:
    """Return the dense bias to add to attention logits that are already scaled (section 3).

    It is relative to the query: the distance is an exact integer before it meets the slope. The
    authors' code adds `slope * key_position` to every row instead, which softmax cannot tell apart
    in real arithmetic but which 16-bit rounding ruins.

    Args:
      slopes: floating [H]; [2, H] for "asymmetric". Finite and at least 0.
      query_positions: integer [..., T], any integer dtype. Only differences matter; they must fit
        int32, the positions themselves are taken modulo 2^32.
      key_positions: integer [..., S], with the same leading axes as `query_positions`.
      kind: "causal" is `-slope * (q - k)`, and -inf for keys after the query. "symmetric" is
        `-slope * |q - k|`. "asymmetric" is the same with `slopes[0]` for keys on the left of the
        query and `slopes[1]` for those on the right.

    For "symmetric", positions may be coordinates in the plane, integer or floating [..., T, 2] and
    [..., S, 2], and the distance is then Euclidean (as in CROMA, arXiv:2311.00566). They are taken
    as coordinates if and only if both arrays have two axes or more and a last axis of exactly 2: a
    batch of 1-D sequences of two tokens reads the same and needs `jax.vmap`.

    Returns:
      f32[..., H, T, S], or f64 if `slopes` is float64. Gradients are finite in `slopes` and in
      floating coordinates.

    Raises:
      TypeError: `slopes` or positions have a dtype that is not allowed.
      ValueError: a shape, `kind`, or a value in `slopes` is not allowed. The values can only be
        checked where they are known: not inside `jit`, `grad` or `vmap`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    slopes = check_slopes(slopes, kind=kind)
    query, key = jnp.asarray(query_positions), jnp.asarray(key_positions)
    planar = kind == "symmetric" and all(p.ndim >= 2 and p.shape[-1] == 2 for p in (query, key))
    for name, positions in (("query_positions", query), ("key_positions", key)):
        check_integer(name, positions, or_floating=planar)
        if positions.ndim == 0:
            raise ValueError(f"{name} must have a shape [..., length], got a scalar")
    trailing = 2 if planar else 1
    if query.shape[:-trailing] != key.shape[:-trailing]:
        raise ValueError(
            f"query_positions {query.shape} and key_positions {key.shape} must have the same "
            f"leading axes; here they are {query.shape[:-trailing]} and {key.shape[:-trailing]}"
        )
    if planar:
        return distance_bias(slopes, _euclidean(query, key, slopes.dtype), kind=kind)
    return distance_bias(slopes, distances(query, key), kind=kind)


def distances(query_positions: QueryPositions, key_positions: KeyPositions) -> Int[Array, "*B T S"]:
    """Return `query - key` as i32[..., T, S]: positive where the key comes before the query."""
    # int32 first: unsigned positions would wrap round instead of going below 0.
    query, key = (jnp.asarray(p).astype(jnp.int32) for p in (query_positions, key_positions))
    return query[..., :, None] - key[..., None, :]


def distance_bias(slopes: Slopes, distance: Array, *, kind: str) -> Bias:
    """Return the bias [..., H, T, S] for signed distances [..., T, S]; nothing is checked.

    This is ALiBi's formula, and `bias` and dense attention share it.
    """
    distance = distance[..., None, :, :]
    head_axes = (*range(distance.ndim - 3), -2, -1)
    if kind == "asymmetric":
        left, right = (jnp.expand_dims(row, head_axes) for row in slopes)
        slope = jnp.where(distance > 0, left, right)
    else:
        slope = jnp.expand_dims(slopes, head_axes)
    linear = -slope * jnp.abs(distance).astype(slopes.dtype)
    # -inf is chosen, never multiplied: a slope's gradient stays finite, and so does slope 0.
    return jnp.where(distance < 0, -jnp.inf, linear) if kind == "causal" else linear


def _euclidean(query: Array, key: Array, dtype: jnp.dtype) -> Array:
    """Return the distances [..., T, S] between points [..., T, 2] and [..., S, 2]."""
    integer = all(jnp.issubdtype(p.dtype, jnp.integer) for p in (query, key))
    query, key = (p.astype(jnp.int32 if integer else dtype) for p in (query, key))
    offset = (query[..., :, None, :] - key[..., None, :, :]).astype(dtype)
    squared = jnp.sum(jnp.square(offset), axis=-1)
    # sqrt has no finite derivative at 0; the inner where keeps it away from there.
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


def horizon(
    slopes: Slopes,
    *,
    logit_range: float | Array,
    tolerance: float | Array,
    length: int | Array | None = None,
) -> Int[Array, "H"]:
    """Return the smallest distance W from which on a causal head's keys can be dropped.

    Dropping every key at distance W or more takes at most `tolerance` of the probability of any
    row, whatever the queries and keys, as long as the logits without bias differ by at most
    `logit_range` within a row and the row sees consecutive positions that end at its own. The
    output then moves by at most `2 * tolerance * max|value|`.

    Derivation. Write m, R, t, L for slope, range, tolerance, length. The worst row has all L keys,
    those dropped at the top of the range and those kept at the bottom. Up to a common factor

        dropped = e^R * (e^(-mW) - e^(-mL)),    kept = 1 - e^(-mW),

    and dropped / (dropped + kept) <= t becomes, with c = t / (t + (1-t) e^R),

        e^(-mW) <= c + (1-c) e^(-mL),    or    L - W <= log(1 + c (e^(mL) - 1)) / m.

    The first form gives W where it is far from L, the second where little can be dropped; each is
    used where float32 rounding does not hurt it. As m -> 0 they tend to L - W <= c L.

    Args:
      slopes: floating [H], finite and at least 0.
      logit_range: largest difference R >= 0, in nats, between two `scale * query.key` of one row;
        a scalar or [H].
      tolerance: the probability t that may be dropped from a row, 0 <= t < 1; a scalar.
      length: number of keys L >= 1 in the longest row (distances 0..L-1), or None for no limit.

    Returns:
      i32[H], at least 1 and at most `length`; float32 rounding may move it where the probability
      is within 1e-4 + 3e-7 * logit_range of `tolerance`, relatively. Without a length it is
      2147483647 (`NEVER`) for a head from which nothing can be dropped at any distance that int32
      holds: slope 0, tolerance 0, or a slope too small for the range. All arguments may be traced.

    Raises:
      TypeError: `slopes` is not floating, or `length` not an integer.
      ValueError: a shape or a known value is out of range.
    """
    slopes = check_slopes(slopes).astype(jnp.float32)
    if jnp.shape(logit_range) not in ((), slopes.shape):
        raise ValueError(
            f"logit_range must be a scalar or have one value a head {slopes.shape}, "
            f"got the shape {jnp.shape(logit_range)}"
        )
    if is_known(logit_range) and not np.all(np.asarray(logit_range) >= 0):
        raise ValueError(f"logit_range must be at least 0, got {logit_range}")
    # In NumPy: what is computed of JAX's arrays inside jit is no longer known.
    if is_known(tolerance) and not 0 <= np.asarray(tolerance) < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")

    # A slope this small bends nothing over 2^31 positions: it stands for 0 without a 0/0.
    slopes = jnp.maximum(slopes, 1e-30)
    logit_range = jnp.asarray(logit_range, jnp.float32)
    tolerance = jnp.asarray(tolerance, jnp.float32)
    log_c = jax.nn.log_sigmoid(jnp.log(tolerance) - jnp.log1p(-tolerance) - logit_range)
    if length is None:
        return _ceil_to_int32(-log_c / slopes)

    if is_known(length) and not np.asarray(length) >= 1:
        raise ValueError(f"length must be at least 1, got {length}")
    length = jnp.asarray(length)
    check_integer("length", length)
    length = as_int32_limit(length)
    total = slopes * length.astype(jnp.float32)
    log_near = jnp.log(-jnp.expm1(-total))  # log(1 - e^(-mL))
    log_odds = log_c + total + log_near  # log(c (e^(mL) - 1))
    far = -log_c - log_near - jax.nn.softplus(-jnp.maximum(log_odds, 0.0))
    droppable = jnp.floor(jax.nn.softplus(jnp.minimum(log_odds, 0.0)) / slopes).astype(jnp.int32)
    result = jnp.where(log_odds > 0, _ceil_to_int32(far / slopes), length - droppable)
    return jnp.clip(result, 1, length)


def _ceil_to_int32(x: Array) -> Array:
    """Round up; what int32 cannot hold becomes `NEVER`."""
    return jnp.where(x < 2.0**31, jnp.ceil(x).astype(jnp.int32), NEVER)


def float_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype to compute bias and logits in: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_known(value: object) -> bool:
    """Whether a value can be looked at now: not inside `jit`, `grad` or `vmap`."""
    return not isinstance(value, jax.core.Tracer)


def check_slopes(slopes: Slopes, *, kind: str = "causal") -> Slopes:
    """Return slopes as a float32 (or float64) array, or raise as `bias` says."""
    slopes = jnp.asarray(slopes)
    leading = (2,) if kind == "asymmetric" else ()
    if not jnp.issubdtype(slopes.dtype, jnp.floating):
        raise TypeError(f"slopes must be floating, got {slopes.dtype}; see alibi_jax.slopes")
    if slopes.ndim == 0 or slopes.shape[:-1] != leading or slopes.size == 0:
        expected = "[2, H]" if leading else "[H]"
        raise ValueError(f"slopes must have the shape {expected} with H >= 1, got {slopes.shape}")
    if is_known(slopes):
        values = np.asarray(slopes, np.float64)
        wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
        if wrong.size:
            raise ValueError(
                "slopes must be finite and at least 0: -slope * distance has to take weight away; "
                f"head {wrong[0][-1]} has {values[tuple(wrong[0])]}"
            )
    return slopes.astype(float_dtype(slopes.dtype))


def check_integer(name: str, values: Array, *, or_floating: bool = False) -> None:
    """Raise a TypeError unless the dtype is an integer (or, if allowed, floating) one."""
    if jnp.issubdtype(values.dtype, jnp.integer):
        return
    if not or_floating:
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name} must be integers or floating coordinates, got {values.dtype}")


def as_int32_limit(values: Array) -> Int[Array, "..."]:
    """Return integers as i32: those beyond its range as the nearest in it, so that none wraps."""
    limits = jnp.iinfo(values.dtype)
    if limits.max > NEVER:
        values = jnp.minimum(values, jnp.asarray(NEVER, values.dtype))
    if limits.min < -NEVER:
        values = jnp.maximum(values, jnp.asarray(-NEVER, values.dtype))
    return values.astype(jnp.int32)


def as_window(window: Any) -> Int[Array, ""] | None:
    """Return a window as i32, or None for None; what is too large becomes the largest.

    Raises:
      TypeError: it is no integer.
      ValueError: it is no scalar, or known and not from 1 to 2^31 - 1.
    """
    if window is None:
        return None
    if jnp.shape(window) != ():
        raise ValueError(f"window must be a scalar, got the shape {jnp.shape(window)}")
    known = values_of(window)
    if known is not None and not 1 <= known < 2**31:
        raise ValueError(f"window must be an integer from 1 to 2^31 - 1, or None; got {window}")
    window = jnp.asarray(window)
    check_integer("window", window)
    return as_int32_limit(window)


def values_of(x: Any) -> np.ndarray | None:
    """Return the values of x; None if it is traced, or in part on devices of other processes."""
    if not is_known(x) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)
