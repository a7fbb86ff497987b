"""A batch of one under a mesh: an axis of size 1 must not lose its sharding on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alibi_jax import attention, slopes


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_batch_of_one_under_a_mesh(key_heads):
    def loss(query, key):
        return attention(query, key, key, slopes(4)).sum()

    query, key = (jax.random.normal(jax.random.key(h), (1, 6, h, 8)) for h in (4, key_heads))
    alone = jax.jit(jax.value_and_grad(loss))(query, key)
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        spec = jax.P("data", None, "tensor", None)
        placed = [jax.device_put(np.asarray(x), spec) for x in (query, key)]
        together = jax.jit(jax.value_and_grad(loss))(*placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, together
    )
    assert jnp.isfinite(alone[0])
