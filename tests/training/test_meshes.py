"""The same losses on one device and on eight, however these divide the work."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alibi_jax.config import OptimizerConfig
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import MESH_AXES, spec
from alibi_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alibi_jax.training.state import init_state
from alibi_jax.training.step import make_train_step

STEPS = 20
MODEL = DecoderConfig(
    num_layers=2, embed_dim=16, num_heads=8, mlp_dim=16, vocab_size=32, dropout=0.1
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)


def losses(make_batch, sizes):
    """Losses of all steps on a mesh; eight heads, so that a tensor axis of 8 has one for each."""
    devices = jax.devices()[: np.prod(sizes)]
    mesh, optimizer = (
        jax.make_mesh(sizes, MESH_AXES, devices=devices),
        make_optimizer(OPTIMIZER, STEPS),
    )
    with jax.set_mesh(mesh):
        graphdef, state = init_state(MODEL, optimizer, 0, mesh)
        schedule = learning_rate_schedule(OPTIMIZER, STEPS)
        step = make_train_step(graphdef, optimizer, schedule, z_loss=1e-3, use_dropout=True)
        sharding, found = NamedSharding(mesh, spec("batch", None)), []
        for seed in range(STEPS):
            batch = make_batch(seed % 4, length=64)
            state, metrics = step(state, jax.device_put(batch, sharding))
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
