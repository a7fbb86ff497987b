"""A learned bias for every bucket of distances (T5, Raffel et al. 2020, arXiv:1910.10683).

Section 2.1, with the formula of the authors' code. There are 32 buckets: one for each distance
below 16, then ever wider ones, by the logarithm, to 128; all distances from there on share the
last. The layers share the biases, as in the paper.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alibi_jax.attention.biases import Bias, DistanceBias, Prefix
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import normal_param
from alibi_jax.models.positions.base import Position, own_stream
from alibi_jax.sharding import spec
from alibi_jax.typing import Activations, Array, Float, Int, Slopes

NUM_BUCKETS, EXACT, MAX_DISTANCE = 32, 16, 128


class T5(Position):
    """A bias by the bucket of the distance.

    Attributes:
      table: f32[H, 32], drawn from N(0, 1/M), as in the authors' code.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        shape, std = (config.num_heads, NUM_BUCKETS), config.embed_dim**-0.5
        self.table = normal_param(own_stream(rngs), shape, ("heads", None), std)

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The bias of each distance to 128."""
        biases = self.table[...].at[:, BUCKETS].get(out_sharding=spec("heads", None))
        return DistanceBias(_function, biases, _upper)


def _buckets() -> np.ndarray:
    distance = np.arange(MAX_DISTANCE + 1)
    logs = np.log(np.maximum(distance, EXACT) / EXACT) / np.log(MAX_DISTANCE / EXACT)
    wide = EXACT + np.floor(logs * (NUM_BUCKETS - EXACT)).astype(int)
    return np.where(distance < EXACT, distance, np.minimum(wide, NUM_BUCKETS - 1)).astype(np.int32)


BUCKETS = _buckets()  # of the distances 0 .. 128


def _function(
    biases: Float[Array, "129"], distance: Int[Array, "t s"], query_position: Array
) -> Float[Array, "t s"]:
    return biases[jnp.minimum(distance, MAX_DISTANCE)]


def _upper(biases: Float[Array, "129"], distance: Int[Array, "n m"]) -> Float[Array, "n m"]:
    return jax.lax.cummax(biases, reverse=True)[jnp.minimum(distance, MAX_DISTANCE)]
