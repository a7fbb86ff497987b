"""ALiBi (attention with linear biases) in JAX and Flax: train short, test long.

`slopes`, `bias`, `horizon` and `attention` are pure functions; `Decoder` is a Flax module.
"""

from alibi_jax.attention import attention
from alibi_jax.bias import bias, horizon, slopes
from alibi_jax.models import Decoder, DecoderConfig

__version__ = "0.1.0"

__all__ = ["Decoder", "DecoderConfig", "attention", "bias", "horizon", "slopes"]
