"""ALiBi with learned scale and exponent (BAM, Bianchessi et al., ICLR 2026, arXiv:2505.22842).

The prior of the Bayesian attention mechanism is a generalised Gaussian: the bias at distance d is
-exp(s) (d + 1e-5)^b, with s and b learned by each head of each layer. At first it is ALiBi: s the
logarithm of its slopes, b 1. A head may make b negative and thereby look at far keys alone. As in
the authors' code (github.com/ArthurSBianchessi/BAM) the location stays 0; their scalable softmax,
a change to attention and not to positions, is not here.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention.biases import Bias, DistanceBias, Prefix
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import array_param, constant_param
from alibi_jax.models.positions.alibi import first_slopes
from alibi_jax.models.positions.base import Position
from alibi_jax.typing import Activations, Array, Float, Int, Slopes

EPSILON = 1e-5  # the authors'; it lets b be negative
LARGEST = 6.0  # exponent, to either side


class Bam(Position):
    """`-exp(s) * (d + 1e-5)^b`."""

    @staticmethod
    def layer(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module:
        """The parameters of a layer."""
        return BamPrior(config)

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The bias, which falls with distance where the exponent is positive."""
        return DistanceBias(_function, (layer.log_scale[...], layer.exponent[...]), _upper)


class BamPrior(nnx.Module):
    """The parameters of one layer.

    Attributes:
      log_scale: f32[H], at first the logarithm of ALiBi's slopes.
      exponent: f32[H], at first 1.
    """

    def __init__(self, config: DecoderConfig):
        self.log_scale = array_param(jnp.log(first_slopes(config)), ("heads",))
        self.exponent = constant_param(1.0, (config.num_heads,), ("heads",))


def _function(
    params: tuple[Array, Array], distance: Int[Array, "t s"], query_position: Array | None
) -> Float[Array, "t s"]:
    log_scale, exponent = params
    # Beyond, float32 overflows at distance 0 or within a million tokens, and gradients are NaN.
    exponent = jnp.clip(exponent, -LARGEST, LARGEST)
    return -jnp.exp(log_scale) * jnp.power(distance.astype(log_scale.dtype) + EPSILON, exponent)


def _upper(params: tuple[Array, Array], distance: Int[Array, "n m"]) -> Float[Array, "n m"]:
    """The bias itself where it falls; it rises towards 0 where the exponent is negative."""
    return jnp.where(params[1] >= 0.0, _function(params, distance, None), 0.0)
