"""A million tokens over eight devices, trained on as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.sharding import MeshConfig, make_mesh, spec
from alibi_jax.training.loss import token_losses

LENGTH, DEVICES = 2**20, 8
# Steep enough that 2048 tokens decide what follows them, flat enough to look into the next chunk.
CONFIG = DecoderConfig(
    vocab_size=16,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    slopes=(0.25, 0.03),
)


@pytest.mark.slow
def test_a_million_tokens_forward_and_backward():
    """Score the first tokens of the last chunk: one device gets the same of 2048 tokens before."""
    start = LENGTH - LENGTH // DEVICES
    scored = slice(start, start + 64)
    window = slice(start - 2048, start + 65)
    tokens = np.random.default_rng(0).integers(0, 16, (1, LENGTH + 1), dtype=np.int32)
    graphdef, _ = nnx.split(jax.eval_shape(lambda: Decoder(CONFIG, nnx.Rngs(0))), nnx.Param)

    def init():
        return nnx.to_pure_dict(nnx.state(Decoder(CONFIG, nnx.Rngs(0)), nnx.Param))

    def loss(params, tokens, weights):
        found = token_losses(nnx.merge(graphdef, params)(tokens[:, :-1]), tokens[:, 1:])
        return jnp.sum(found * weights), found

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    weights = np.zeros((1, LENGTH), np.float32)
    weights[:, scored] = 1

    alone = gradients(jax.jit(init)(), tokens[:, window], weights[:, window][:, :-1])
    mesh = make_mesh(MeshConfig(1, 1, 1, DEVICES))
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, spec("batch", None))
        weights = jax.device_put(weights, spec("batch", "length"))
        params = jax.jit(init)()
        compiled = gradients.lower(params, placed, weights).compile()
        (_, found), grads = compiled(params, placed, weights)
    (_, expected), expected_grads = alone
    np.testing.assert_allclose(np.asarray(found)[:, scored], expected[:, -64:], rtol=2e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), y, rtol=1e-3, atol=1e-4),
        grads,
        expected_grads,
    )
    # Of one device; the logits of its chunk are 8 MB, and one head's of all tokens were 4 TB.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29
