"""ALiBi (attention with linear biases) in JAX and Flax: train short, test long.

`slopes`, `bias`, `horizon` and `attention` are pure functions; `Decoder` is a Flax module.
`LinearBias`, `DistanceBias` and `PrefixBias` are what `attention` takes in the place of slopes.
"""

from alibi_jax.attention import attention
from alibi_jax.attention.biases import DistanceBias, LinearBias, PrefixBias, prefix_sums
from alibi_jax.bias import bias, horizon, slopes
from alibi_jax.models import Decoder, DecoderConfig

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DistanceBias",
    "LinearBias",
    "PrefixBias",
    "attention",
    "bias",
    "horizon",
    "prefix_sums",
    "slopes",
]
