"""Kernelised relative position embedding (KERPLE, Chi et al. 2022, NeurIPS, arXiv:2205.09921).

With p and a learned for each head and shared by the layers, the bias at distance d is

    -p * log(1 + a d)   (log),    -a * d^p   with p at most 2   (power),

over sqrt(D), with D the head size: the paper (equation 5) divides the sum of q.k and the bias, as
is done here, unlike ALiBi. The authors' code (github.com/chijames/KERPLE) divides q.k alone, so its
p (log) or a (power) is this one's over sqrt(D). `attention_scale` is a factor on q.k and leaves the
bias as it is.

p is drawn from U(0, 2) and a from U(0, 1), and at least 0.01, as in the authors' code, which then
clips them to that after every step. Here their logarithm is learned (of power's p, the logit of
p/2), which keeps them in range and never leaves them without a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention.biases import Bias, DistanceBias, Prefix
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import array_param
from alibi_jax.models.positions.base import Position, own_stream
from alibi_jax.typing import Activations, Array, Float, Int, Slopes

LEAST, MOST = 0.01, 1.99  # of a first value; MOST only for power's p, which stays below 2


class KerpleLog(Position):
    """`-p * log(1 + a d) / sqrt(D)`.

    Attributes:
      log_p, log_a: f32[H].
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        rngs = own_stream(rngs)
        self.log_p = array_param(jnp.log(_uniform(rngs, config, 2.0)), ("heads",))
        self.log_a = array_param(jnp.log(_uniform(rngs, config, 1.0)), ("heads",))

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The bias, which falls with distance."""
        p = self.config.head_size**-0.5 * jnp.exp(self.log_p[...])
        return DistanceBias(_log, (p, jnp.exp(self.log_a[...])), _log)


class KerplePower(Position):
    """`-a * d^p / sqrt(D)`.

    Attributes:
      log_a: f32[H].
      logit_p: f32[H]; p is 2 sigmoid(logit_p).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        rngs = own_stream(rngs)
        half_p = jnp.minimum(_uniform(rngs, config, 2.0), MOST) / 2.0
        self.logit_p = array_param(jnp.log(half_p / (1.0 - half_p)), ("heads",))
        self.log_a = array_param(jnp.log(_uniform(rngs, config, 1.0)), ("heads",))

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The bias, which falls with distance."""
        a = self.config.head_size**-0.5 * jnp.exp(self.log_a[...])
        return DistanceBias(_power, (a, 2.0 * jax.nn.sigmoid(self.logit_p[...])), _power)


def _uniform(rngs: nnx.Rngs, config: DecoderConfig, most: float) -> Float[Array, "H"]:
    draw = jax.random.uniform(rngs.params(), (config.num_heads,), jnp.float32)
    return jnp.maximum(most * draw, LEAST)


def _log(
    params: tuple[Array, Array], distance: Int[Array, "t s"], query_position: Array | None = None
) -> Float[Array, "t s"]:
    p, a = params
    return -p * jnp.log1p(a * distance.astype(a.dtype))


def _power(
    params: tuple[Array, Array], distance: Int[Array, "t s"], query_position: Array | None = None
) -> Float[Array, "t s"]:
    a, p = params
    # 0^p = 0 has no finite derivative in p.
    power = jnp.power(jnp.maximum(distance, 1).astype(a.dtype), p)
    return jnp.where(distance > 0, -a * power, 0.0)
