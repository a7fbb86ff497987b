"""Functional interpolation (FIRE, Li et al., ICLR 2024, section 3 and appendix, arXiv:2310.04418).

The bias of query i and key j is an MLP of one number, f(psi(i - j) / psi(max(i, L))) with
psi(x) = log(1 + c x): distances as a part of the query's own position, or of L where that is more,
so that the MLP never meets a value that it has not been trained on. Here i is the position in the
row, also where documents are packed. c, L and the MLP, 1-32-H, are learned by each layer for itself
(FIRE, not FIRE-S). Nothing bounds the bias of far keys, so attention leaves out no tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention.biases import Bias, DistanceBias, Prefix
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import array_param, constant_param
from alibi_jax.models.positions.base import Position, own_stream
from alibi_jax.sharding import spec
from alibi_jax.typing import Activations, Array, Float, Int, Slopes

WIDTH, FIRST_C, FIRST_L, EPSILON = 32, 0.1, 512.0, 1e-6  # the authors'


class Fire(Position):
    """A learned function of the distance over the query's position."""

    @staticmethod
    def layer(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module:
        """The function of a layer."""
        return FireFunction(config, own_stream(rngs))

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The function, with a copy for each head of what heads share."""
        shared = (layer.c, layer.multiplier, layer.hidden, layer.hidden_shift)
        copies = [_for_each_head(param[...], self.config.num_heads) for param in shared]
        return DistanceBias(_function, (*copies, layer.out[...], layer.out_shift[...]))


def _for_each_head(param: Array, heads: int) -> Float[Array, "H ..."]:
    sharding = spec("heads", *(None,) * param.ndim)
    return jnp.broadcast_to(param[None], (heads, *param.shape), out_sharding=sharding)


class FireFunction(nnx.Module):
    """The parameters of one layer; weights are drawn as PyTorch's Linear does.

    Attributes:
      c: f32[], at first 0.1.
      multiplier: f32[], at first 1; L is 512 times this.
      hidden, hidden_shift: f32[32], weights and biases of the hidden layer.
      out, out_shift: f32[H, 32] and f32[H], of the output.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        def uniform(limit: float, *shape: int) -> Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit)

        self.c, self.multiplier = constant_param(FIRST_C, (), ()), constant_param(1.0, (), ())
        self.hidden = array_param(uniform(1.0, WIDTH), (None,))
        self.hidden_shift = array_param(uniform(1.0, WIDTH), (None,))
        limit = WIDTH**-0.5
        self.out = array_param(uniform(limit, config.num_heads, WIDTH), ("heads", None))
        self.out_shift = array_param(uniform(limit, config.num_heads), ("heads",))


@jax.checkpoint
def _function(
    params: tuple[Array, ...], distance: Int[Array, "t s"], query_position: Int[Array, "t 1"]
) -> Float[Array, "t s"]:
    c, multiplier, hidden, hidden_shift, out, out_shift = params
    limit = jnp.abs(FIRST_L * multiplier)
    longest = jnp.maximum(query_position.astype(c.dtype), limit)
    part = jnp.log1p(jnp.abs(c * distance.astype(c.dtype)))
    part = part / (jnp.log1p(jnp.abs(c * longest)) + EPSILON)
    # One hidden unit after the other, so that [t, s, 32] never exists.
    units = (out[k] * jax.nn.relu(hidden[k] * part + hidden_shift[k]) for k in range(WIDTH))
    return sum(units, out_shift)
