"""What blocks are made of. Parameters are float32; computation is in `config.dtype`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.models.config import DecoderConfig
from alibi_jax.sharding import spec
from alibi_jax.typing import Array, Float


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), sharded by its logical axes."""
    draw = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec(*axes))
    return nnx.Param(std * draw)


def constant_param(value: float, shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    """A float32 parameter that starts at one value, sharded by its logical axes."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, device=_placement(*axes)))


def array_param(value: Float[Array, "..."], axes: tuple) -> nnx.Param:
    """A float32 parameter that starts at these values, sharded by its logical axes."""
    partition = spec(*axes)
    return nnx.Param(value if partition is None else jax.sharding.reshard(value, partition))


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
