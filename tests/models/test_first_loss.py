"""A decoder begins by knowing nothing: its first loss is the entropy of a uniform guess."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from alibi_jax.models import Decoder, DecoderConfig

BASE = DecoderConfig(vocab_size=257, num_layers=1, embed_dim=128, num_heads=4, embed_scale=128**0.5)
CASES = {
    "unit variance": {},
    "wide": {"embed_dim": 512, "embed_scale": 512**0.5},
    "sinusoidal": {"position": "sinusoidal"},
    "untied, norm of the embedding": {"tie_embeddings": False, "embed_norm": True},
    "norm of the embedding": {"embed_norm": True, "norm": "rmsnorm"},
    "small embedding, no final norm": {"embed_scale": 1.0, "final_norm": False},
    "bands, no final norm": {
        "vocab_size": 2000,
        "adaptive_cutoffs": (200, 600),
        "final_norm": False,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_first_loss_is_that_of_uniform_guesses(name):
    config = dataclasses.replace(BASE, **CASES[name])
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 33)).astype(np.int32)

    @jax.jit
    def losses():
        model = Decoder(config, nnx.Rngs(0))
        return model.token_losses(tokens[:, :-1], tokens[:, 1:])[0]

    # With bands: uniform over the head's words and two tails, then over the words of the tail.
    sizes = np.diff((0, *(config.adaptive_cutoffs or ()), config.vocab_size))
    band = np.searchsorted(np.cumsum(sizes), tokens[:, 1:], side="right")
    entropy = math.log(sizes[0] + len(sizes) - 1) + np.where(band > 0, np.log(sizes)[band], 0.0)
    assert abs(float(np.mean(losses())) - entropy.mean()) < 0.2
