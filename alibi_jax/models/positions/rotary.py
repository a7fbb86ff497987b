"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.2.2, arXiv:2104.09864).

`length_scaling`, for rows longer than those of training (D is the head size, s the factor):

- "linear": positions are divided by s (Chen et al. 2023, arXiv:2306.15595).
- "ntk": the base is multiplied by s^(D/(D-2)), which leaves the highest frequency and divides the
  lowest by s (bloc97 2023; Peng et al. 2023, "YaRN", section 3.1, arXiv:2309.00071).
- "dynamic": the same, with s = max(1, length / trained length) (emozilla 2023; YaRN, section 3.3).
- "yarn": frequencies that turn more than 32 times in the trained length stay, those that turn less
  than once are divided by s, between them a ramp, and logits are multiplied by (0.1 ln s + 1)^2
  (YaRN, sections 3.2 and 3.4). The ramp is linear in the index of the frequency, between whole
  indices, as in the authors' code (github.com/jquesnelle/yarn), which others follow; the paper
  writes it as linear in the number of turns.
"""

import math

import jax.numpy as jnp
import numpy as np

from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.positions.base import Position
from alibi_jax.models.positions.phases import angles
from alibi_jax.typing import Array, Float, QueryPositions

BASE = 10_000.0
FAST, SLOW = 32.0, 1.0  # turns in the trained length; the authors' for LLaMA


class Rotary(Position):
    """Turns dimension i of a query or key together with dimension i + D/2, as in GPT-NeoX."""

    def rotate(
        self, x: Float[Array, "B T H D"], positions: QueryPositions, length: int
    ) -> Float[Array, "B T H D"]:
        """Turns x by its positions times the frequencies, in float32."""
        angle = angles(positions, frequencies(self.config, length))[:, :, None, :]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
        return (temperature(self.config) * turned).astype(x.dtype)


def frequencies(config: DecoderConfig, length: int) -> np.ndarray:
    """Radians a position, float64[D/2], in a row of that length."""
    half, factor = config.head_size // 2, config.scaling_factor
    index = np.arange(half)
    plain = BASE ** (-index / half)
    if config.length_scaling == "linear":
        return plain / factor
    if config.length_scaling == "dynamic":
        assert config.trained_length is not None
        factor = max(1.0, length / config.trained_length)
    if config.length_scaling in ("ntk", "dynamic"):
        return plain * factor ** (-index / (half - 1))
    if config.length_scaling == "yarn":
        kept = 1.0 - _ramp(config)
        return plain * kept + plain / factor * (1.0 - kept)
    return plain


def temperature(config: DecoderConfig) -> float:
    """Factor on queries and on keys, so that logits have its square."""
    if config.length_scaling != "yarn":
        return 1.0
    return 0.1 * math.log(config.scaling_factor) + 1.0


def _ramp(config: DecoderConfig) -> np.ndarray:
    """0 for frequencies that stay, 1 for those that are divided, float64[D/2]."""
    length = config.trained_length
    assert length is not None

    def index(turns: float) -> float:
        """The index of the frequency that turns so often in the trained length."""
        return half * math.log(length / (2.0 * math.pi * turns)) / math.log(BASE)

    half = config.head_size // 2
    low = max(math.floor(index(FAST)), 0)
    high = min(math.ceil(index(SLOW)), config.head_size - 1)
    width = high - low if high > low else 0.001  # as in the authors' code
    return np.clip((np.arange(half) - low) / width, 0.0, 1.0)
