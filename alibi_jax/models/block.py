"""A transformer block: attention, which places tokens by the position method, and an MLP."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention import attention
from alibi_jax.attention.biases import Bias, Prefix, PrefixBias
from alibi_jax.models.attention_mass import mass_by_distance
from alibi_jax.models.cache import Cache, read, sums_before, write
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import Linear, Norm, dropout
from alibi_jax.models.positions import POSITION_METHODS, Position
from alibi_jax.typing import (
    Activations,
    Array,
    Float,
    Key,
    Query,
    QueryPositions,
    SegmentIds,
    Slopes,
    Value,
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Row(NamedTuple):
    """What layers know of the tokens, besides their activations.

    Attributes:
      method: the position method, with what it shares over layers.
      positions: i32[B, T].
      given_positions: the same if the caller gave them; None: they are 0 .. T-1, as attention
        takes them by itself.
      segment_ids: i32[B, T] or None.
      window: see `alibi_jax.attention`.
      length: tokens in the whole row: T, or the length of the cache.
    """

    method: Position
    positions: QueryPositions
    given_positions: QueryPositions | None
    segment_ids: SegmentIds | None
    window: Array | None
    length: int


class SelfAttention(nnx.Module):
    """Causal multi-head self-attention with grouped queries and a position method.

    `position` has the parameters of the method that this layer does not share, or is None.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        heads, kv_heads, size, std = c.num_heads, c.kv_heads, c.head_size, c.embed_dim**-0.5
        self.clip, self.scale = c.clip_qkv, c.attention_scale

        def project(num_heads: int) -> Linear:
            shape, axes = (c.embed_dim, num_heads, size), ("embed", "heads", None)
            return Linear(
                "btm,mhd->bthd", rngs, shape, axes, num_inputs=1, std=std, use_bias=c.qkv_bias
            )

        self.query, self.key, self.value = project(heads), project(kv_heads), project(kv_heads)
        self.query_norm, self.key_norm = _qk_norm(c, heads), _qk_norm(c, kv_heads)
        self.out = Linear(
            "bthd,hdm->btm",
            rngs,
            (heads, size, c.embed_dim),
            ("heads", None, "embed"),
            num_inputs=2,
            std=_branch_std(c, heads * size),
            use_bias=c.out_bias,
        )
        self.position = POSITION_METHODS[c.position].layer(c, rngs)

    def inputs(
        self, x: Activations, row: Row, before: Prefix | None = None
    ) -> tuple[Query, Key, Value, Slopes | Bias]:
        """What attention takes for x: queries and keys after any rotation, values, and the bias.

        `before` is the prefix sums up to the token before x, where the bias is made of them.
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.clip is not None:
            query, key, value = (jnp.clip(y, -self.clip, self.clip) for y in (query, key, value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (row.method.rotate(y, row.positions, row.length) for y in (query, key))
        return query, key, value, row.method.bias(self.position, x, row.length, before)

    def __call__(
        self, x: Activations, row: Row, cache: Cache | None = None, layer: int | Array = 0
    ) -> tuple[Activations, Cache | None]:
        """Mixes x over positions; the bias is added inside `alibi_jax.attention`.

        With a cache, x is the tokens that follow those of the cache, which is returned with them;
        `layer` is the one that this is.
        """
        if cache is None:
            query, key, value, bias = self.inputs(x, row)
            query_positions = key_positions = row.given_positions
        else:
            query, key, value, bias = self.inputs(x, row, sums_before(cache, layer))
            prefix = bias.key if isinstance(bias, PrefixBias) else None
            cache = write(cache, layer, key, value, prefix)
            key, value, prefix = read(cache, layer)
            if isinstance(bias, PrefixBias) and prefix is not None:
                bias = PrefixBias(bias.query, prefix)
            # Causality hides the part that is not filled yet.
            query_positions = cache.filled + jnp.arange(x.shape[1], dtype=jnp.int32)
            key_positions = jnp.arange(cache.length, dtype=jnp.int32)
        mixed = attention(
            query,
            key,
            value,
            bias,
            scale=self.scale,
            query_positions=query_positions,
            key_positions=key_positions,
            segment_ids=row.segment_ids,
            window=row.window,
        )
        return self.out(mixed), cache

    def mass(
        self, x: Activations, row: Row, edges: tuple[int, ...], num_queries: int
    ) -> Float[Array, "B H N"]:
        """Probability by distance; see `alibi_jax.models.attention_mass`."""
        query, key, _, bias = self.inputs(x, row)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return mass_by_distance(query, key, bias, scale=scale, edges=edges, num_queries=num_queries)


def _qk_norm(config: DecoderConfig, num_heads: int) -> Norm | None:
    if config.qk_norm is None:
        return None
    if config.qk_norm == "per_head":
        return Norm(config, (config.head_size,))
    return Norm(config, (num_heads, config.head_size), ("heads", None))


def _branch_std(config: DecoderConfig, fan_in: int) -> float:
    # Each of the 2 * num_layers branches adds to the residual stream (GPT-2, section 2.3).
    return 1.0 / math.sqrt(2 * config.num_layers * fan_in)


class MLP(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c, std = config, config.embed_dim**-0.5
        self.activation, self.dropout = c.activation, c.mlp_dropout

        def widen() -> Linear:
            shape, axes = (c.embed_dim, c.mlp_size), ("embed", "mlp")
            return Linear(
                "btm,mf->btf", rngs, shape, axes, num_inputs=1, std=std, use_bias=c.mlp_bias
            )

        self.up = widen()
        self.gate = widen() if c.gated_mlp else None
        self.down = Linear(
            "btf,fm->btm",
            rngs,
            (c.mlp_size, c.embed_dim),
            ("mlp", "embed"),
            num_inputs=1,
            std=_branch_std(c, c.mlp_size),
            use_bias=c.mlp_bias,
        )

    def __call__(self, x: Activations, key: jax.Array | None = None) -> Activations:
        """The MLP at every position; `key` turns dropout on."""
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = activation(self.up(x))
        else:
            hidden = activation(self.gate(x)) * self.up(x)
        return self.down(dropout(hidden, self.dropout, key, "mlp"))


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, (config.embed_dim,))
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = Norm(config, (config.embed_dim,))
        self.mlp = MLP(config, rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x: Activations,
        row: Row,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        layer: int | Array = 0,
    ) -> tuple[Activations, Cache | None]:
        """Adds attention(norm(x)), then mlp(norm(x)); `key` turns dropout on.

        Cache and layer are those of `SelfAttention`.
        """
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        y, cache = self.attention(self.attention_norm(x), row, cache, layer)
        x = x + dropout(y, self.dropout, keys[0])
        x = x + dropout(self.mlp(self.mlp_norm(x), keys[1]), self.dropout, keys[2])
        return x, cache
