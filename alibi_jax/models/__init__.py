"""Flax NNX models: the decoder, its configuration and its position methods."""

from alibi_jax.models.config import DecoderConfig
from alibi_jax.models.decoder import Decoder

__all__ = ["Decoder", "DecoderConfig"]
