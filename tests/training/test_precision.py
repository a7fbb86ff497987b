"""What stays float32 when a model computes in bfloat16."""

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from alibi_jax.models import Decoder, DecoderConfig
from alibi_jax.training.loss import summed_loss


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_softmax_loss_and_gradients_are_float32(remat):
    config = DecoderConfig(
        vocab_size=32,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        dtype="bfloat16",
        remat=remat,
        activation="relu",  # so that every exponential is a softmax's
    )
    graphdef, params = nnx.split(jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)
    ids = jax.ShapeDtypeStruct((2, 9), jnp.int32)

    def loss(params, tokens, segment_ids):
        model = nnx.merge(graphdef, params)
        losses = model.token_losses(tokens[:, :-1], tokens[:, 1:], segment_ids=segment_ids[:, :-1])
        return summed_loss(losses, segment_ids, z_loss=1e-4)[0]

    jaxpr, shapes = jax.make_jaxpr(jax.value_and_grad(loss), return_shape=True)(params, ids, ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    found = {name: set() for name in ("exp", "log", "reduce_max", "rsqrt", "logits", "projection")}
    shapes = {(16, 32): "logits", (16, 16): "projection"}  # of all tokens
    for eqn in equations(jaxpr.jaxpr):
        name = eqn.primitive.name
        if name == "dot_general":
            (output,) = (variable.aval for variable in eqn.outvars)
            name = shapes.get(output.shape, name)
        if name in found:
            checked = output if name in shapes.values() else eqn.invars[0].aval
            found[name].add(checked.dtype.name)
    assert found.pop("projection") >= {"bfloat16"}  # it does compute in bfloat16
    assert found == {name: {"float32"} for name in found}
