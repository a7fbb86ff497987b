"""Model FLOPs against the products that a step is made of, and against PaLM's own MFU."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.training.chips import peak_flops
from alibi_jax.training.flops import flops_per_token

BATCH, LENGTH = 3, 24


def product_flops(jaxpr) -> int:
    """Two for each multiplication of every `dot_general` in it, times the length of its scans."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), lhs = eqn.params["dimension_numbers"], eqn.invars[0].aval
            depth = math.prod(lhs.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(product_flops, jax.extend.core.jaxprs_in_params(eqn.params)))
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "scan_layers": False, "position": "sinusoidal"},
        {"gated_mlp": True, "num_kv_heads": 2, "head_dim": 6, "mlp_dim": 20, "dtype": "bfloat16"},
    ],
)
def test_they_are_the_products_of_a_step(changes):
    config = DecoderConfig(vocab_size=40, num_layers=3, embed_dim=16, num_heads=4, **changes)
    graphdef, params = nnx.split(jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)

    def loss(params, tokens):
        return jnp.sum(nnx.merge(graphdef, params)(tokens))

    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens)
    assert product_flops(jaxpr.jaxpr) == BATCH * LENGTH * flops_per_token(config, LENGTH)


def test_palm():
    """Chowdhery et al. 2022, table 3 and appendix B: 46.2% at 238.3K tokens/s on 6144 TPU v4."""
    palm = DecoderConfig(
        vocab_size=256_000,
        num_layers=118,
        embed_dim=18_432,
        num_heads=48,
        num_kv_heads=1,
        head_dim=256,
        gated_mlp=True,
    )
    flops = flops_per_token(palm, 2048)
    assert flops / 6 == pytest.approx(540.35e9, rel=0.02)  # its parameters, and attention
    mfu = 238.3e3 * flops / (6144 * peak_flops("TPU v4"))
    assert mfu == pytest.approx(0.462, abs=5e-4)


def test_unknown_devices_have_no_peak():
    assert peak_flops("cpu") is None
    assert peak_flops(jax.devices()[0].device_kind) is None
    assert 2 * peak_flops("TPU7x") == 2307e12  # two devices a chip
