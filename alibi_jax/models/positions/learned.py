"""A learned vector for every position (Gehring et al. 2017, arXiv:1705.03122; GPT, BERT)."""

import jax.numpy as jnp
from flax import nnx

from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import normal_param
from alibi_jax.models.positions.base import Position, own_stream
from alibi_jax.sharding import replicate, spec
from alibi_jax.typing import Activations, QueryPositions


class Learned(Position):
    """A table of `config.trained_length` vectors; every later position has the last one.

    Attributes:
      table: f32[trained_length, M], drawn from N(0, 1/M).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        assert config.trained_length is not None
        shape, std = (config.trained_length, config.embed_dim), config.embed_dim**-0.5
        self.table = normal_param(own_stream(rngs), shape, (None, "embed"), std)

    def embed(self, x: Activations, positions: QueryPositions) -> Activations:
        """Adds the vectors of the positions."""
        rows = jnp.clip(positions, 0, len(self.table[...]) - 1)
        table = replicate(self.table[...])
        return x + table.at[rows].get(out_sharding=spec("batch", "length", None)).astype(x.dtype)
