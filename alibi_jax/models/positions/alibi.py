"""Attention with linear biases (Press, Smith, Lewis, ICLR 2022, section 3, arXiv:2108.12409).

Options, all off by default:

- `alibi_heads`: only so many heads have the bias, with the slopes of that many, and the rest none
  (`alibi_num_heads` of lucidrains/x-transformers).
- `learned_slopes`: slopes are learned, by their logarithm, so that they stay positive
  (`LearnedAlibiPositionalBias` of the same), and by each layer for itself, as BAM's are. Press et
  al. tried learned slopes, without saying whether layers shared them, and found that they "did not
  yield strong extrapolation results" (section 3).
- `length_scaling`, for rows longer than those of training: "linear" divides all slopes by a factor,
  as if distances were that much shorter; "dynamic" divides them by how many times the row is longer
  than the trained length, and not at all up to it (Al-Khateeb et al. 2023, arXiv:2310.13017); "ntk"
  leaves the steepest slope, divides the shallowest by the factor, and those between by a power of
  it in proportion to the logarithm of the slope (github.com/keezen/ntk_alibi, whose exponent
  (h-1)/(H-1) that is for a geometric sequence of slopes).
- `sink`: the first token of the row is at distance 0 from all, so that it can serve as the
  attention sink (Xiao et al. 2023, arXiv:2309.17453) at any length. Our own.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from alibi_jax.attention.biases import Bias, LinearBias, Prefix
from alibi_jax.bias import slopes as standard_slopes
from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.layers import array_param
from alibi_jax.models.positions.base import Position
from alibi_jax.typing import Activations, Slopes


class Alibi(Position):
    """`-slope * distance` in every layer."""

    @staticmethod
    def layer(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module | None:
        """The learned slopes of a layer."""
        return LearnedSlopes(config) if config.learned_slopes else None

    def bias(self, layer: Any, x: Activations, length: int, before: Prefix | None) -> Slopes | Bias:
        """The slopes, given or learned, for a row of that length."""
        config = self.config
        slopes = first_slopes(config) if layer is None else jnp.exp(layer.log_slopes[...])
        if len(slopes) < config.num_heads:
            slopes = jnp.pad(slopes, (0, config.num_heads - len(slopes)))
        if config.length_scaling == "linear":
            slopes = slopes / config.scaling_factor
        elif config.length_scaling == "dynamic":
            assert config.trained_length is not None
            slopes = slopes * min(1.0, config.trained_length / length)
        elif config.length_scaling == "ntk":
            slopes = slopes * config.scaling_factor ** -_shallowness(slopes)
        return LinearBias(slopes, sink=True) if config.sink else slopes


class LearnedSlopes(nnx.Module):
    """The slopes of one layer.

    Attributes:
      log_slopes: f32[biased heads], the logarithms; at first those of the standard slopes.
    """

    def __init__(self, config: DecoderConfig):
        # Fewer than all heads may not divide over devices.
        axis = "heads" if config.biased_heads == config.num_heads else None
        self.log_slopes = array_param(jnp.log(first_slopes(config)), (axis,))


def first_slopes(config: DecoderConfig) -> Slopes:
    """The standard slopes for this head count, or those given, times the scale: f32[heads]."""
    if config.slopes is None:
        return config.slope_scale * standard_slopes(config.biased_heads, bias_max=config.bias_max)
    return jnp.asarray(config.slope_scale * np.asarray(config.slopes), jnp.float32)


def _shallowness(slopes: Slopes) -> Slopes:
    """0 for the steepest slope, 1 for the shallowest, by the logarithm; without slope, whatever."""
    logs = jnp.log(jnp.where(slopes > 0, slopes, jnp.max(slopes)))
    steepest, shallowest = jnp.max(logs), jnp.min(logs)
    return (steepest - logs) / jnp.maximum(steepest - shallowest, 1e-6)
