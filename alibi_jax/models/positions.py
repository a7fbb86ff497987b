"""Position methods: how a decoder learns where a token is.

A method has two places to act, and the decoder calls both without knowing which method it has:
`embed` once, on the token embeddings, and `slopes` for the linear bias of every layer's attention.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from alibi_jax.bias import slopes as standard_slopes
from alibi_jax.models.config import DecoderConfig
from alibi_jax.typing import Activations, QueryPositions, Slopes


class NoPosition(nnx.Module):
    """No position information but the causal mask (NoPE, Kazemnejad et al. 2023)."""

    def __init__(self, config: DecoderConfig):
        self.num_heads = config.num_heads

    def embed(self, x: Activations, positions: QueryPositions) -> Activations:
        """Token embeddings [B, T, M] with whatever the method adds at positions [B, T]."""
        return x

    def slopes(self) -> Slopes:
        """Penalty per token of distance and head, f32[H]; zero: attention has no bias."""
        return jnp.zeros(self.num_heads, jnp.float32)


class Alibi(NoPosition):
    """Attention with linear biases (Press, Smith, Lewis, ICLR 2022, section 3)."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.bias_max, self.scale, self.given = config.bias_max, config.slope_scale, config.slopes

    def slopes(self) -> Slopes:
        """The standard slopes for this head count, or those given, times the scale: f32[H]."""
        if self.given is None:
            return self.scale * standard_slopes(self.num_heads, bias_max=self.bias_max)
        return jnp.asarray(self.scale * np.asarray(self.given), jnp.float32)


class Sinusoidal(NoPosition):
    """Fixed sinusoids added to the embeddings (Vaswani et al. 2017, section 3.5)."""

    def embed(self, x: Activations, positions: QueryPositions) -> Activations:
        """Adds sin(p / 10000^(2i/M)) in the first half of the M dimensions, cos in the second."""
        half = x.shape[-1] // 2
        frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return x + waves.astype(x.dtype)


POSITION_METHODS: dict[str, type[NoPosition]] = {
    "alibi": Alibi,
    "none": NoPosition,
    "sinusoidal": Sinusoidal,
}
