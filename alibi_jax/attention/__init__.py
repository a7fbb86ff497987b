"""`attention`: one function, and the implementations behind it."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alibi_jax.attention import choice
from alibi_jax.attention.biases import Bias, LinearBias, PrefixBias, as_bias, beyond_slopes
from alibi_jax.attention.case import Case
from alibi_jax.attention.derivatives import ADVICE
from alibi_jax.attention.devices import per_device
from alibi_jax.attention.placement import length_is_sharded, whole_length
from alibi_jax.bias import as_window, check_integer, is_known
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

DTYPES = tuple(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))


def attention(
    query: Query,
    key: Key,
    value: Value,
    slopes: Slopes | Bias,
    *,
    causal: bool = True,
    scale: float | Array | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    segment_ids: SegmentIds | None = None,
    key_segment_ids: SegmentIds | None = None,
    window: int | Array | None = None,
    tolerance: float | None = None,
    implementation: str | None = None,
) -> Attended:
    """Attend with linear biases: softmax over `scale * query.key - slope * distance`.

    Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, section 3. As in its footnote 10 the
    scale never touches the bias. Logits and softmax are float32 (float64 for float64 inputs), and
    so is the accumulation of both products. A query that sees no key gives zeros, and zero
    gradients: with T > S and the default positions these are the first T - S.

    What a query does not see does not matter to it, NaN and infinity included, and what it sees
    does: one key or value that is not finite makes NaN of the whole row of output, and of every
    gradient that the row has a part in, however far away it is. (With "dense" two things reach
    further: a cotangent that is not finite, of a row that is, the values that the row does not see,
    and in forward mode such a tangent of a key or value the rows that do not see it.)

    Differentiable in `query`, `key`, `value` and `slopes` (or the arrays of another bias). The
    implementations that go by tiles have `jax.grad`, and `jax.jvp` of that; "dense" has all orders
    and modes. Slopes that are constants held as an array in a module of another library are, to
    `jax.grad`, parameters: give `jax.lax.stop_gradient(slopes)`.

    Under an explicit mesh, batch and head axes may be sharded without further annotation, as long
    as the mesh axis of the heads divides K, or K is 1 and replicated. So may the lengths of query,
    key and value, alike and over one mesh axis: positions are those in the whole sequence, and keys
    go round a ring of devices as far as the slope of their head reaches
    (`alibi_jax.attention.context`). "blockwise" and "pallas_tpu" can do that, but for a sink or a
    `PrefixBias`.

    Args:
      query: floating [B, T, H, D].
      key: [B, S, K, D], of the dtype of `query`. K divides H, and query head h reads key head
        `h // (H // K)` (grouped queries).
      value: [B, S, K, Dv], of the same dtype; Dv may differ from D.
      slopes: floating [H], finite and at least 0: one for each query head. See `alibi_jax.slopes`.
        Or another bias: an `alibi_jax.LinearBias`, `DistanceBias` or `PrefixBias`. "dense" and
        "blockwise" can do all of them.
      causal: whether a query sees only keys whose position is not after its own. If not, it sees
        all, and the distance is `|query_position - key_position|`.
      scale: scalar factor of `query.key`; 1/sqrt(D) if None.
      query_positions: integer [T] or [B, T], any integer dtype; see `alibi_jax.bias`. The default
        aligns the ends: queries at S-T..S-1, keys at 0..S-1, so that the last query sees all keys.
      key_positions: integer [S] or [B, S]. If T == S, one of the two may be left out and is then
        the same as the other.
      segment_ids: integer [B, T], compared as int32. A query sees only keys of an equal id: give
        each packed document an id, and padding another.
      key_segment_ids: integer [B, S]; the same as `segment_ids` if left out, where T == S.
      window: a query sees only keys at a distance below this, an integer of at least 1, which may
        be traced: one program serves all. None: no limit. "dense" and "blockwise" can do that.
      tolerance: the most probability that an implementation may leave out of a row, a number in
        [0, 1). The output moves by at most `2 * tolerance * max|value|` and in practice by far
        less (`alibi_jax.attention.tiles`). 0 leaves out nothing; None is the dtype's own precision,
        half of `finfo(dtype).eps`. "dense" always leaves out nothing.
      implementation: None for the best that fits platform, shapes and dtype, or one of
        "dense": all logits at once, in O(T S) memory;
        "blockwise": tile by tile, in O(T + S) memory, on any platform; it leaves out tiles;
        "pallas_tpu": the same as a kernel of our own, on TPU: bfloat16 or float32, D and Dv at
          most 256;
        "cudnn": cuDNN's flash attention, in O(T) memory, on NVIDIA GPUs: causal, bfloat16, T = S,
          no positions or segments; the bias is in extra columns (`alibi_jax.attention.columns`);
        "splash": JAX's splash attention, with the same columns, on TPU: causal, no positions. It
          is there to compare with.

    Returns:
      [B, T, H, Dv] in the dtype of `query`.

    Raises:
      TypeError: a dtype is not allowed.
      ValueError: shapes do not fit together, or a value is not allowed. Values in `slopes` are
        checked only where they are known: not inside `jit`, `grad` or `vmap`.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_inputs(query, key, value)
    batch, length, heads, head_dim = query.shape

    bias = as_bias(slopes, query.dtype, batch, heads, (length, key.shape[1]))
    window = as_window(window)
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    elif jnp.shape(scale) != ():
        raise ValueError(f"scale must be a scalar, got the shape {jnp.shape(scale)}")
    if not is_known(tolerance):
        raise TypeError(f"tolerance must be a number that is known when tracing, got {tolerance}")
    tolerance = float(jnp.finfo(query.dtype).eps) / 2 if tolerance is None else float(tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be None or at least 0 and below 1, got {tolerance}")

    case = Case(
        choice.platform(),
        query.dtype,
        batch,
        heads,
        length,
        key.shape[1],
        head_dim,
        value.shape[3],
        causal,
        aligned=query_positions is None and key_positions is None,
        segmented=segment_ids is not None,
        shared_segments=key_segment_ids is None,
        scale=None if isinstance(scale, Array) else float(scale),
        capability=choice.capability(),
        length_sharded=length_is_sharded(query),
        beyond_slopes=beyond_slopes(bias, window),
    )
    if implementation is None:
        implementation = choice.choose(case)
    choice.require_serves(implementation, case)

    sizes = batch, length, key.shape[1]
    query_positions, key_positions = _positions(query_positions, key_positions, *sizes)
    segment_ids, key_segment_ids = _segments(segment_ids, key_segment_ids, *sizes)
    chosen = choice.IMPLEMENTATIONS[implementation]
    tokens = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "segment_ids": segment_ids,
        "key_segment_ids": key_segment_ids,
    }
    try:
        return _attend(
            query,
            key,
            value,
            bias,
            None if chosen.fixed_scale else scale,
            tokens,
            window,
            name=implementation,
            causal=causal,
            tolerance=tolerance,
            fixed_scale=case.scale if chosen.fixed_scale else None,
            constants=chosen.constants(),
        )
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"implementation={implementation!r} has no derivative in forward mode (jvp): {ADVICE}"
        ) from error


# One program for each shape, also where `attention` is called outside of jit.
@partial(jax.jit, static_argnames=("name", "causal", "tolerance", "fixed_scale", "constants"))
def _attend(
    query: Query,
    key: Key,
    value: Value,
    bias: Bias,
    scale: float | Array | None,
    tokens: dict[str, Any],
    window: Array | None,
    *,
    name: str,
    causal: bool,
    tolerance: float,
    fixed_scale: float | None,
    constants: tuple[Any, ...],
) -> Attended:
    """Compute `attention`, of which all is checked and filled in, by the implementation named.

    One of the two scales is None. Of `constants` the program depends, and so must its cache.
    """
    scale = fixed_scale if scale is None else scale
    assert scale is not None
    if window is not None:
        # One that was not known could not be refused: with NaN it does not pass for an answer.
        scale = jnp.where(window >= 1, scale, jnp.nan)
        window = jnp.maximum(window, 1)
    chosen = choice.IMPLEMENTATIONS[name]
    attend = partial(chosen.attend, causal=causal, tolerance=tolerance)
    if name == "dense":
        query, key, value = whole_length(query), whole_length(key), whole_length(value)
        if isinstance(bias, PrefixBias):
            bias = jax.tree.map(whole_length, bias)
    else:
        attend = partial(per_device, attend)
    if chosen.any_bias:
        return attend(query, key, value, bias, scale=scale, window=window, **tokens)
    assert isinstance(bias, LinearBias)
    return attend(query, key, value, bias.slopes, scale=scale, **tokens)


def _check_inputs(query: Array, key: Array, value: Array) -> None:
    """Check that query [B, T, H, D], key [B, S, K, D] and value [B, S, K, Dv] fit together."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"query, key and value must be [batch, length, heads, head dim], got {shapes}"
        )
    if 0 in (*query.shape, *key.shape, *value.shape):
        raise ValueError(f"no axis may be empty, got {shapes}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have the same batch (axis 0), got {shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"key and value must have the same length and heads (axes 1 and 2), got {shapes}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head dim (axis 3), got {shapes}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the key heads must divide the query heads, got {query.shape[2]} query heads and "
            f"{key.shape[2]} key heads"
        )
    dtypes = f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {dtypes}; cast them first")
    if query.dtype not in DTYPES:
        raise TypeError(
            f"query, key and value must be {', '.join(map(str, DTYPES))}, got {dtypes}; cast them"
        )


def _positions(
    query_positions: Any, key_positions: Any, batch: int, length: int, key_length: int
) -> tuple[Any, Any]:
    """Check positions, or fill them in, as i32[1 or B, T] and i32[1 or B, S]."""
    if query_positions is None and key_positions is None:
        return (
            np.arange(key_length - length, key_length, dtype=np.int32)[None],
            np.arange(key_length, dtype=np.int32)[None],
        )
    query_positions, key_positions = _pair(
        "positions", query_positions, key_positions, length, key_length
    )
    return (
        _per_token("query_positions", query_positions, (length,), (batch, length)),
        _per_token("key_positions", key_positions, (key_length,), (batch, key_length)),
    )


def _segments(
    segment_ids: Any, key_segment_ids: Any, batch: int, length: int, key_length: int
) -> tuple[Any, Any]:
    """Check segment ids, as i32[B, T] and i32[B, S], or None for both."""
    if segment_ids is None:
        if key_segment_ids is not None:
            raise ValueError("key_segment_ids was given without segment_ids; give both")
        return None, None
    segment_ids, key_segment_ids = _pair(
        "segment_ids", segment_ids, key_segment_ids, length, key_length
    )
    return (
        _per_token("segment_ids", segment_ids, (batch, length)),
        _per_token("key_segment_ids", key_segment_ids, (batch, key_length)),
    )


def _pair(name: str, of_query: Any, of_key: Any, length: int, key_length: int) -> tuple[Any, Any]:
    """Return both; one that is missing is the same as the other, if the lengths allow it."""
    if of_query is None or of_key is None:
        if length != key_length:
            raise ValueError(
                f"{name} were given for one side only, which needs as many queries as keys, but T "
                f"is {length} and S is {key_length}; give them for queries and for keys"
            )
        of_query = of_key = of_key if of_query is None else of_query
    return of_query, of_key


def _per_token(name: str, values: Any, *shapes: tuple[int, ...]) -> Array:
    """Return integers, one a token, as i32[B or 1, length]."""
    values = jnp.asarray(values)
    check_integer(name, values)
    if values.shape not in shapes:
        raise ValueError(
            f"{name} must have the shape {' or '.join(map(str, shapes))}, got {values.shape}"
        )
    return jnp.atleast_2d(values.astype(jnp.int32))
