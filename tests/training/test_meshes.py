"""The same losses on one device and on eight, however these divide the work."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alibi_jax.config import OptimizerConfig
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import MESH_AXES, spec
from alibi_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alibi_jax.training.state import abstract_state, init_state
from alibi_jax.training.step import make_train_step

STEPS = 20
# Eight heads: a tensor axis of 8 has one for each device, which must have its own slope.
MODEL = DecoderConfig(num_layers=1, embed_dim=16, num_heads=8, mlp_dim=16, vocab_size=32)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)


@functools.cache
def initial_state():
    """Drawn once, on the host."""
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(MODEL, make_optimizer(OPTIMIZER, STEPS), 0, mesh)[1]
    return jax.tree.map(np.asarray, dataclasses.replace(state, key=None))


def losses(make_batch, sizes):
    """The loss of every step on a mesh."""
    mesh = jax.make_mesh(sizes, MESH_AXES, devices=jax.devices()[: np.prod(sizes)])
    optimizer, schedule = (
        make_optimizer(OPTIMIZER, STEPS),
        learning_rate_schedule(OPTIMIZER, STEPS),
    )
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(MODEL, optimizer, 0, mesh)
        abstract = dataclasses.replace(abstract, key=None)
        state = jax.tree.map(
            lambda x, to: jax.device_put(x, to.sharding), initial_state(), abstract
        )
        step, found = make_train_step(graphdef, optimizer, schedule), []
        for seed in range(STEPS):
            batch = make_batch(seed % 4, length=32)
            state, metrics = step(
                state, jax.device_put(batch, NamedSharding(mesh, spec("batch", None)))
            )
            found.append(metrics["loss"])
        return np.asarray([float(loss) for loss in found])


@pytest.fixture(scope="module")
def alone(make_batch):
    return losses(make_batch, (1, 1, 1, 1))


@pytest.mark.parametrize(
    "sizes",
    [
        (8, 1, 1, 1),
        (1, 8, 1, 1),
        (1, 1, 8, 1),
        (1, 1, 1, 8),
        (2, 2, 2, 1),
        (1, 2, 2, 2),
        (2, 1, 2, 2),
    ],
)
def test_losses_are_those_of_one_device(make_batch, alone, sizes):
    assert alone[-1] < alone[0] - 0.2
    np.testing.assert_allclose(losses(make_batch, sizes), alone, rtol=1e-5)
