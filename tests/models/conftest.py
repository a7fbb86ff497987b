"""Small decoders whose parameters are all large enough to matter."""

import jax
import numpy as np
import pytest
from flax import nnx

from alibi_jax.models import Decoder


@pytest.fixture
def noisy():
    """From a config to the structure and the parameters of a decoder."""

    def make(config):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
        graphdef, params = nnx.split(shapes, nnx.Param)
        return graphdef, jax.tree.map(
            lambda x: jax.device_put(rng.normal(0.2, 0.4, x.shape).astype(np.float32)), params
        )

    return make
