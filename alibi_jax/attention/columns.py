"""ALiBi through kernels that know nothing of biases: as columns beside the queries and keys.

A bias that is a sum of products of something of the query with something of the key needs no
support in a kernel: with these appended to the head dimension, `query.key` contains it (FlashBias,
Wu et al., arXiv:2505.12044). Causal ALiBi is one, `-slope * (i - j) = slope * j - slope * i`, since
the mask takes away the side where the distance changes sign. Symmetric ALiBi is not.

Stored in bfloat16 as they are, slope and position ruin it: 2^-8 of a position 60,000 is hundreds of
tokens. So each is split into terms that bfloat16 holds exactly, each at most 2^-8 of the one before
(a Dekker split): s = s1 + s2 + s3 for 24 bits, j = j1 + j2 + j3, and

    s j = s1 j1 + s1 j2 + s1 j3 + s2 j1 + s2 j2 + s3 j1 + e,    |e| <= 2^-23 |s j|,

with half that for |j| <= 2^17, where j3 = 0. A product of two such terms is exact in float32.
Two more columns hold -s i, also as bfloat16 terms. They need not be exact, as softmax ignores what
a whole row shares. But they keep the sums small: without them the log-sum-exp of a row, from which
backward passes compute the weights again, is as large as slope * position and as coarse.

What remains is the kernel's own float32 sum, whose terms are as large as slope * |position|, so
positions count from the middle. A logit is off by a few 2^-24 of the slope times half the length:
for the steepest of 16 heads (0.71) at 65,536 tokens 0.001 to 0.009, depending on how the hardware
sums, where 16-bit weights are rounded by up to 0.004 of themselves.

Such kernels add their masks, so that a NaN reaches rows that do not see it. They are given finite
numbers, and a running test over keys says which rows are NaN, and over rows which gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Bool, Float

from alibi_jax.attention.case import Case, refusal_beyond_slopes
from alibi_jax.attention.nonfinite import as_nan_keys, finite, finite_rows
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

COLUMNS = 8
SPLASH_BLOCK = 512  # queries and keys a block, where there are as many
LANES = 128  # splash takes blocks of multiples of this


def query_columns(slopes: Slopes, positions: QueryPositions) -> Float[Array, "#B T H 8"]:
    """Return the query's side of `-slope * (query_position - key_position)`.

    The derivative in the slopes is that of the bias itself, not that of the rounding.

    Args:
      slopes: floating [H], divided by the scale with which the kernel multiplies `query.key`.
      positions: integer [1 or B, T], relative to the middle of the sequence.

    Returns:
      f32[1 or B, T, H, 8], s1 s1 s1 s2 s2 s3 r1 r2 with r for `-slope * position`, all of which
      bfloat16 holds exactly.
    """
    return _query_columns(slopes.astype(jnp.float32), positions.astype(jnp.float32))


def key_columns(positions: KeyPositions) -> Float[Array, "#B S 8"]:
    """Return the key's side of `-slope * (query_position - key_position)`.

    Args:
      positions: integer [1 or B, S], relative to the middle of the sequence, at most 2^24 from it.

    Returns:
      f32[1 or B, S, 8], j1 j2 j3 j1 j2 j1 1 1, all of which bfloat16 holds exactly.
    """
    j1, j2, j3 = _split(positions.astype(jnp.float32), 3)
    one = jnp.ones_like(j1)
    return jnp.stack([j1, j2, j3, j1, j2, j1, one, one], axis=-1)


@jax.custom_jvp
def _query_columns(slopes: Array, positions: Array) -> Array:
    """Return `query_columns` for positions f32[1 or B, T]."""
    rows = -slopes[None, None] * positions[..., None]
    s1, s2, s3 = (jnp.broadcast_to(s, rows.shape) for s in _split(slopes, 3))
    return jnp.stack([s1, s1, s1, s2, s2, s3, *_split(rows, 2)], axis=-1)


@_query_columns.defjvp
def _query_columns_jvp(primals, tangents):
    """Let s1 and r1 carry the whole derivative: their keys j1 + j2 + j3 and 1 are whole too."""
    slopes, positions = primals
    one, zero = jnp.ones_like(positions), jnp.zeros_like(positions)
    weights = jnp.stack([one, one, one, zero, zero, zero, -positions, zero], axis=-1)
    tangent = tangents[0][None, None, :, None] * weights[:, :, None]
    return _query_columns(slopes, positions), tangent


def _split(x: Array, terms: int) -> list[Array]:
    """Return f32 terms that bfloat16 holds and that sum to x, up to 2^-8 of the last one."""
    parts: list[Array] = []
    for _ in range(terms):
        # Not a cast there and back, which XLA may leave out as excess precision.
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return parts


def with_columns(
    query: Query,
    key: Key,
    slopes: Slopes,
    query_positions: QueryPositions,
    key_positions: KeyPositions,
) -> tuple[Float[Array, "B T H D+8"], Float[Array, "B S K D+8"]]:
    """Return query and key so that their product has causal ALiBi's bias, up to a row's constant.

    Args:
      query: [B, T, H, D], bfloat16 or float32.
      key: [B, S, K, D].
      slopes: floating [H], divided by the scale of the product.
      query_positions: integer [1 or B, T].
      key_positions: integer [1 or B, S], 0..S-1: the middle is taken to be S // 2.
    """
    middle = key.shape[1] // 2
    columns = query_columns(slopes, query_positions - middle)
    # Still in float32, in which their gradients are then summed over batch and length.
    columns = jnp.broadcast_to(columns, (*query.shape[:3], COLUMNS))
    of_keys = key_columns(key_positions - middle)[:, :, None]
    of_keys = jnp.broadcast_to(of_keys, (*key.shape[:3], COLUMNS))
    # Last, so that in a matrix unit that sums 16 at a time only the last step has large terms.
    return (
        jnp.concatenate([query, columns.astype(query.dtype)], axis=-1),
        jnp.concatenate([key, of_keys.astype(key.dtype)], axis=-1),
    )


def cudnn(
    query: Query,
    key: Key,
    value: Value,
    slopes: Slopes,
    *,
    causal: bool,
    scale: float,
    query_positions: QueryPositions,
    key_positions: KeyPositions,
    segment_ids: SegmentIds | None,
    key_segment_ids: SegmentIds | None,
    tolerance: float,
) -> Attended:
    """Compute `alibi_jax.attention` by cuDNN's flash attention, where `refusal_cudnn` allows it.

    The gradient of the slopes comes out of the kernel as columns in bfloat16. Their rounding adds
    noise to each row's share of it: 3 % for the steepest of 16 heads at 16,384 tokens and growing
    with the length; without the query's own columns it would be 20 times the gradient itself.
    """
    del causal, key_segment_ids, tolerance
    tokens = query_positions, key_positions, segment_ids
    kernel = partial(_cudnn, float(scale))
    return _causal(kernel, query, *as_nan_keys(key, value), slopes, tokens)


def _cudnn(scale, query, key, value, slopes, tokens):
    """Compute `cudnn` of what is finite."""
    query_positions, key_positions, _ = tokens
    query, key = with_columns(query, key, slopes / scale, query_positions, key_positions)
    length, value_dim = value.shape[1], value.shape[3]
    # JAX's function wants one head dim for all three, and an even length to train with. Zeros
    # change nothing in the one, and at the end of the other the mask hides them.
    width, even_length = _cudnn_width(query.shape[3], value_dim), length + length % 2
    query, key, value = (_pad(_pad(x, 3, width), 1, even_length) for x in (query, key, value))
    output = jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=True, implementation="cudnn"
    )
    return output[:, :length, :, :value_dim]


def refusal_cudnn(case: Case) -> str | None:
    """Return why `cudnn` cannot serve a case, to be read after its name, or None."""
    if case.platform != "gpu" or case.capability is None:
        return "needs an NVIDIA GPU"
    if case.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {_version(case.capability)}"
    if case.dtype != jnp.bfloat16:
        # float16 ends at 65504: slope * position does not fit.
        return f"needs bfloat16, not {case.dtype}"
    if case.length != case.key_length:
        return f"needs as many queries as keys, not T = {case.length} and S = {case.key_length}"
    if case.segmented:
        return "takes no segment_ids"
    limit = 256 if case.capability >= (9, 0) else 128
    if _cudnn_width(case.head_dim + COLUMNS, case.value_dim) > limit:
        return (
            f"needs head dims of at most {limit - COLUMNS}, and {limit} for values, on compute "
            f"capability {_version(case.capability)}, not {case.head_dim} and {case.value_dim}"
        )
    if case.scale is None or case.scale == 0:
        return "needs a scale that is a Python number, and not 0: it divides the slopes"
    return _refusal_of_bias(case)


def splash(
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
) -> Attended:
    """Compute `alibi_jax.attention` by JAX's splash attention, where `refusal_splash` allows it.

    It is here to compare with. The kernel has no scale: queries are multiplied beforehand, which
    rounds them once more unless the scale is a power of two.
    """
    del causal, key_segment_ids, tolerance
    query = (query.astype(jnp.float32) * jnp.asarray(scale, jnp.float32)).astype(query.dtype)
    tokens = query_positions, key_positions, segment_ids
    return _causal(_splash, query, *as_nan_keys(key, value), slopes, tokens)


def _splash(query, key, value, slopes, tokens):
    """Compute `splash` of what is finite and scaled."""
    query_positions, key_positions, segment_ids = tokens
    length, key_length = query.shape[1], key.shape[1]
    block, key_block = _splash_block(length), _splash_block(key_length)
    query, key = with_columns(query, key, slopes, query_positions, key_positions)
    # Keys after the last are hidden by the mask; queries after the last are cut off below.
    query = _pad(query, 1, -(-length // block) * block)
    key, value = (_pad(x, 1, -(-key_length // key_block) * key_block) for x in (key, value))
    shape = query.shape[1], key.shape[1]
    mask = splash_attention.CausalMask(shape, offset=key_length - length)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=key_block,
            block_q_dkv=block,
            block_kv_dkv=key_block,
            block_q_dq=block,
            block_kv_dq=key_block,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    segments = None
    if segment_ids is not None:
        segments = splash_attention.SegmentIds(*(_pad(segment_ids, 1, n) for n in shape))
    output = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (query, key, value)), segments)
    return output.swapaxes(1, 2)[:, :length]


def refusal_splash(case: Case) -> str | None:
    """Return why `splash` cannot serve a case, to be read after its name, or None."""
    if case.platform != "tpu":
        return "needs a TPU"
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, not {case.dtype}"
    # To a row that sees no key it would give the mean of the values.
    if case.length > case.key_length:
        return (
            f"needs at least as many keys as queries, not T = {case.length} and "
            f"S = {case.key_length}"
        )
    if case.segmented and not case.shared_segments:
        return "takes no key_segment_ids: every query must see a key"
    return _refusal_of_bias(case)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(kernel, query, key, value, slopes, tokens):
    """Return `kernel(query, key, value, slopes, tokens)`, causal attention whose ends align.

    The kernel never gets what is not finite. A row that sees some of it is NaN, and so are the
    gradients that it has a part in. Values are finite (`nonfinite.as_nan_keys`), and `tokens` are
    positions of queries and keys, and segment ids or None.
    """
    return _causal_forward(kernel, query, key, value, slopes, tokens)[0]


def _causal_forward(kernel, query, key, value, slopes, tokens):
    attend, segment_ids = partial(kernel, tokens=tokens), tokens[2]
    output, pullback = jax.vjp(attend, finite(query), finite(key), value, slopes)
    (length, heads), key_heads = query.shape[1:3], key.shape[2]
    poisoned = _any_so_far(~finite_rows(key), segment_ids)[:, -length:]
    poisoned = jnp.repeat(poisoned, heads // key_heads, axis=2) | ~finite_rows(query)
    output = jnp.where(poisoned[..., None], jnp.nan, output)
    return output, (pullback, poisoned, segment_ids)


def _causal_backward(kernel, kept, cotangent):
    pullback, poisoned, segment_ids = kept
    dquery, dkey, dvalue, dslopes = pullback(finite(cotangent))
    (batch, key_length, key_heads, _), length = dkey.shape, dquery.shape[1]
    poisoned |= ~finite_rows(cotangent)
    of_key_heads = poisoned.reshape(batch, length, key_heads, -1).any(axis=-1)
    # Keys before the first query have no row of their own.
    rows = jnp.pad(of_key_heads, [(0, 0), (key_length - length, 0), (0, 0)])[:, ::-1]
    ids = None if segment_ids is None else segment_ids[:, ::-1]
    seen = _any_so_far(rows, ids)[:, ::-1, :, None]
    return (
        jnp.where(poisoned[..., None], jnp.nan, dquery),
        jnp.where(seen, jnp.nan, dkey),
        jnp.where(seen, jnp.nan, dvalue),
        jnp.where(poisoned.any(axis=(0, 1)), jnp.nan, dslopes),
        None,
    )


_causal.defvjp(_causal_forward, _causal_backward)


def _any_so_far(
    flags: Bool[Array, "B L K"], segment_ids: SegmentIds | None
) -> Bool[Array, "B L K"]:
    """Return whether a token, or one of its segment before it, has the flag."""
    if segment_ids is None:
        return jax.lax.cummax(flags.astype(jnp.int8), axis=1) > 0
    # With equal ids side by side: is the last flag at or after where the segment starts?
    order = jnp.argsort(segment_ids, axis=1, stable=True)
    ids = jnp.take_along_axis(segment_ids, order, axis=1)[:, :, None]
    flags = jnp.take_along_axis(flags, order[:, :, None], axis=1)
    index = jnp.arange(flags.shape[1], dtype=jnp.int32)[None, :, None]
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0), (0, 0)])
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    last = jax.lax.cummax(jnp.where(flags, index, -1), axis=1)
    return jnp.take_along_axis(last >= start, jnp.argsort(order, axis=1)[:, :, None], axis=1)


def _refusal_of_bias(case: Case) -> str | None:
    """Return why columns cannot hold the bias, or None."""
    if not case.causal:
        return "needs causal=True: columns cannot hold |i - j|"
    if not case.aligned:
        return "takes no positions: its mask is that of the indices"
    if case.length_sharded:
        return "needs whole sequences, and these are divided over devices"
    return refusal_beyond_slopes(case)


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _cudnn_width(head_dim: int, value_dim: int) -> int:
    """Return the one head dim of queries, keys and values: cuDNN wants a multiple of 8."""
    return -(-max(head_dim, value_dim) // 8) * 8


def _splash_block(length: int) -> int:
    """Return the size of blocks for a length."""
    return min(SPLASH_BLOCK, -(-length // LANES) * LANES)


def _pad(x: Array, axis: int, size: int) -> Array:
    """Return x with zeros at the end of an axis, up to a size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
