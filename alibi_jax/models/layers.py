"""The parts of a transformer block. Parameters are float32; computation is in `config.dtype`."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention import attention
from alibi_jax.models.config import DecoderConfig
from alibi_jax.sharding import spec
from alibi_jax.typing import Activations, Array, Float, QueryPositions, SegmentIds, Slopes

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), sharded by its logical axes."""
    draw = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec(*axes))
    return nnx.Param(std * draw)


def constant_param(value: float, shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    """A float32 parameter that starts at one value, sharded by its logical axes."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, device=_placement(*axes)))


def _placement(*axes: str | None):
    partition = spec(*axes)
    mesh = jax.sharding.get_abstract_mesh()
    return None if partition is None else jax.sharding.NamedSharding(mesh, partition)


def _broadcast(param: jax.Array, x: jax.Array) -> jax.Array:
    # Sharded as x. Were it replicated, its gradient would gather the activations of all devices.
    return jnp.broadcast_to(param, x.shape, out_sharding=jax.typeof(x).sharding)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last `ndim` axes, computed in float32."""

    def __init__(self, config: DecoderConfig, shape: tuple[int, ...], axes: tuple | None = None):
        axes = (None,) * len(shape) if axes is None else axes
        self.eps, self.center, self.ndim = config.norm_eps, config.norm == "layernorm", len(shape)
        self.scale = constant_param(1.0, shape, axes)
        has_bias = self.center and config.norm_bias
        self.bias = constant_param(0.0, shape, axes) if has_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalised x, in x's shape and dtype."""
        dims = tuple(range(-self.ndim, 0))
        y = x.astype(jnp.float32)
        if self.center:
            y = y - jnp.mean(y, dims, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), dims, keepdims=True) + self.eps)
        y = y * _broadcast(self.scale[...], y)
        if self.bias is not None:
            y = y + _broadcast(self.bias[...], y)
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """A projection, `einsum(equation, x, kernel) + bias`, in x's dtype.

    Attributes:
      kernel: f32, of the shape given, drawn from N(0, std^2).
      bias: f32 of the shape of the output's trailing axes, zero at first; or None.
    """

    def __init__(
        self,
        equation: str,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        axes: tuple,
        *,
        num_inputs: int,
        std: float,
        use_bias: bool,
    ):
        self.equation = equation
        self.kernel = normal_param(rngs, shape, axes, std)
        # Activations are sharded over the batch, so a bias and an output never are over "embed".
        axes = tuple(axis if axis != "embed" else None for axis in axes)
        self.in_axes, self.out_axes = axes[:num_inputs], axes[num_inputs:]
        self.out_shape = shape[num_inputs:]
        self.bias = constant_param(0.0, self.out_shape, self.out_axes) if use_bias else None

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """The projection of x."""
        kernel = self.kernel[...].astype(x.dtype)
        out_sharding = spec("batch", "length", *self.out_axes)
        if jax.sharding.get_abstract_mesh().size > 1:
            y = jnp.einsum(self.equation, x, kernel, out_sharding=out_sharding)
        else:
            # All tokens as the rows of one matrix, which sharded axes could not be merged into:
            # else XLA's CPU backend copies the transposed activations for the kernel's gradient.
            tokens, inputs = x.shape[0] * x.shape[1], math.prod(x.shape[2:])
            into, out = self.in_axes[0], self.out_axes[0]
            rows = x.reshape(tokens, inputs, out_sharding=spec("batch", into))
            matrix = kernel.reshape(inputs, -1, out_sharding=spec(into, out))
            y = jnp.matmul(rows, matrix, out_sharding=spec("batch", out))
            y = y.reshape(*x.shape[:2], *self.out_shape, out_sharding=out_sharding)
        if self.bias is not None:
            y = y + _broadcast(self.bias[...].astype(x.dtype), y)
        return y


class SelfAttention(nnx.Module):
    """Causal multi-head self-attention with grouped queries and a linear bias."""

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

    def __call__(
        self,
        x: Activations,
        slopes: Slopes,
        positions: QueryPositions | None,
        segment_ids: SegmentIds | None,
    ) -> Activations:
        """Mixes x over positions; the bias is added inside `alibi_jax.attention`."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.clip is not None:
            query, key, value = (jnp.clip(y, -self.clip, self.clip) for y in (query, key, value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed = attention(
            query,
            key,
            value,
            slopes,
            scale=self.scale,
            query_positions=positions,
            key_positions=positions,
            segment_ids=segment_ids,
        )
        return self.out(mixed)


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


def dropout(
    x: Float[Array, "B T D"], rate: float, key: jax.Array | None, axis: str | None = None
) -> Float[Array, "B T D"]:
    """Inverted dropout; the identity when there is no key (evaluation) or the rate is 0.

    `axis` is the logical name of the last axis of x.
    """
    if key is None or rate == 0.0:
        return x
    sharding = spec("batch", "length", axis)
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=sharding)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


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
        slopes: Slopes,
        positions: QueryPositions | None,
        segment_ids: SegmentIds | None,
        key: jax.Array | None,
    ) -> Activations:
        """Adds attention(norm(x)), then mlp(norm(x)); `key` turns dropout on."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        y = self.attention(self.attention_norm(x), slopes, positions, segment_ids)
        x = x + dropout(y, self.dropout, keys[0])
        return x + dropout(self.mlp(self.mlp_norm(x), keys[1]), self.dropout, keys[2])
