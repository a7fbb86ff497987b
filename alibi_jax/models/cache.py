"""Keys and values of earlier tokens, so that a long row can be read a chunk at a time."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from alibi_jax.attention.biases import Prefix
from alibi_jax.models.config import DecoderConfig
from alibi_jax.sharding import spec
from alibi_jax.typing import Array, Float, Int


@partial(register_dataclass, data_fields=["key", "value", "prefix", "filled"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """What a decoder keeps of the tokens of B rows that it has read, with room for S of each.

    Attributes:
      key, value: [layers, B, S, K, D] in `config.dtype`; keys are as attention takes them, after
        any rotation. Zeros where there is no token yet.
      prefix: prefix sums of log forget gates, f32[layers, B, S, H] twice, or None.
      filled: i32[], tokens read so far of each row, and the position of the next.
    """

    key: Float[Array, "L B S K D"]
    value: Float[Array, "L B S K D"]
    prefix: Prefix | None
    filled: Int[Array, ""]

    @property
    def length(self) -> int:
        """S, the tokens that it has room for."""
        return self.key.shape[2]


def empty_cache(config: DecoderConfig, batch: int, length: int, *, prefix: bool) -> Cache:
    """A cache of no tokens yet, with prefix sums if so asked."""
    rows = (config.num_layers, batch, length)

    def zeros(*sizes: int, dtype: str = config.dtype) -> Array:
        sharding = spec(None, "batch", None, "heads", *(None,) * (len(sizes) - 1))
        return jnp.zeros((*rows, *sizes), dtype, out_sharding=sharding)

    def keys() -> Array:
        return zeros(config.kv_heads, config.head_size)

    def sums() -> Array:
        return zeros(config.num_heads, dtype="float32")

    return Cache(
        keys(), keys(), Prefix(sums(), sums()) if prefix else None, jnp.zeros((), jnp.int32)
    )


def write(
    cache: Cache, layer: int | Array, key: Array, value: Array, prefix: Prefix | None
) -> Cache:
    """The cache with what one layer has for its next tokens: [B, C, K, D], and sums [B, C, H]."""

    def put(rows: Array, chunk: Array) -> Array:
        axes = ("batch", None, "heads", None)[: chunk.ndim]
        chunk = chunk if spec() is None else jax.sharding.reshard(chunk, spec(*axes))
        start = (layer, 0, cache.filled, *(0,) * (chunk.ndim - 2))
        start = tuple(jnp.asarray(index, jnp.int32) for index in start)  # also with 64 bits
        return jax.lax.dynamic_update_slice(rows, chunk[None], start)

    key, value, prefix = jax.tree.map(
        put, (cache.key, cache.value, cache.prefix), (key, value, prefix)
    )
    return Cache(key, value, prefix, cache.filled)


def read(cache: Cache, layer: int | Array) -> tuple[Array, Array, Prefix | None]:
    """Keys and values [B, S, K, D] of one layer, and its prefix sums [B, S, H]."""
    of_cache = (cache.key, cache.value, cache.prefix)
    return jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, layer, 0, keepdims=False), of_cache
    )


def sums_before(cache: Cache, layer: int | Array) -> Prefix | None:
    """Prefix sums of one layer up to its last token, [B, 1, H]: 0 where there is none yet."""

    def last(rows: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, jnp.maximum(cache.filled - 1, 0), 1, axis=1)

    return jax.tree.map(last, read(cache, layer)[2])
