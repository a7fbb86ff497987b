"""What a position method is: the places where it may act, and how its parameters are made.

A decoder calls all of them without knowing which method it has: `embed` once, on the token
embeddings, and in every layer `rotate`, on queries and keys, and `bias`, for the attention logits.
Parameters that all layers share belong to the method, which the decoder holds; those that every
layer has for itself are what `layer` makes, which the block holds, stacked over layers.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alibi_jax.attention.biases import Bias, Prefix
from alibi_jax.models.config import DecoderConfig
from alibi_jax.typing import Activations, Array, Float, QueryPositions, Slopes

# Folded into the key of a stream of parameters, whose own counter stays far below.
STREAM = zlib.crc32(b"position")


class Position(nnx.Module):
    """A method that acts nowhere, from which the others differ."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        """Draws the parameters that all layers share."""
        self.config = config

    @staticmethod
    def layer(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module | None:
        """The parameters of one layer, or None: it has none of its own."""
        return None

    def embed(self, x: Activations, positions: QueryPositions) -> Activations:
        """Token embeddings [B, T, M] with whatever the method adds at positions i32[B, T]."""
        return x

    def rotate(
        self, x: Float[Array, "B T H D"], positions: QueryPositions, length: int
    ) -> Float[Array, "B T H D"]:
        """Queries or keys at positions i32[B, T] of a row of `length` tokens."""
        return x

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """What attention adds to its logits.

        Args:
          layer: what `layer` made, of this layer.
          x: the input of attention, after its norm, [B, T, M].
          length: tokens in the whole row: T, or the length of the cache.
          before: of a bias by prefix sums, those up to the token before x, [B, 1, H]; None: x
            begins the row.

        Returns:
          Slopes f32[H], or another bias of `alibi_jax.attention.biases`.
        """
        return jnp.zeros(self.config.num_heads, jnp.float32)


def own_stream(rngs: nnx.Rngs) -> nnx.Rngs:
    """A stream for the parameters of the method, which leaves all others as they are without it."""
    return nnx.Rngs(jax.random.fold_in(rngs.params.key[...], STREAM))
