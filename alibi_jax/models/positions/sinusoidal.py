"""Fixed sinusoids added to the embeddings (Vaswani et al. 2017, section 3.5, arXiv:1706.03762)."""

import jax.numpy as jnp
import numpy as np

from alibi_jax.models.positions.base import Position
from alibi_jax.models.positions.phases import angles
from alibi_jax.typing import Activations, QueryPositions


class Sinusoidal(Position):
    """sin(p / 10000^(2i/M)) in the first half of the M dimensions, cos in the second."""

    def embed(self, x: Activations, positions: QueryPositions) -> Activations:
        """Adds the sinusoids of the positions; tensor2tensor's order, which fairseq keeps."""
        half = x.shape[-1] // 2
        angle = angles(positions, 10_000.0 ** (-np.arange(half) / half))
        return x + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(x.dtype)
