"""The benchmark of a step: the part for a GPU cannot run here at its size, so it runs tiny."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from alibi_jax.config import Config
from alibi_jax.models import Decoder
from alibi_jax.sharding import make_mesh
from benchmarks import train_step


@pytest.mark.parametrize(
    ("model", "millions"), [(train_step.MODEL, 10.7), (train_step.PAPER, 1362.0)]
)
def test_the_models_have_the_stated_number_of_parameters(model, millions):
    shapes = nnx.state(jax.eval_shape(lambda: Decoder(model, nnx.Rngs(0))), nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    width, hidden = model.embed_dim, model.mlp_size
    matrices = model.num_layers * (4 * width**2 + 2 * width * hidden) + model.vocab_size * width
    biases = model.num_layers * (4 * width + hidden + width + 4 * width) + 2 * width
    assert count == matrices + biases
    assert count / 1e6 == pytest.approx(millions, rel=5e-3)


def test_the_part_for_a_gpu_runs(monkeypatch):
    tiny = dataclasses.replace(
        train_step.PAPER, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, vocab_size=50
    )
    monkeypatch.setattr(train_step, "PAPER", tiny)
    monkeypatch.setattr(train_step, "PAPER_TOKENS", 256)
    monkeypatch.setattr(train_step, "REPEATS", 1)
    with jax.set_mesh(make_mesh(Config().mesh)):
        alibi = train_step.on_gpu("alibi", 16)
        sinusoidal = train_step.on_gpu("sinusoidal", 32)
    assert alibi["parameters"] == sinusoidal["parameters"]
    # Twelve more for each layer, dimension and token of length, half of which are masked.
    more = sinusoidal["model_flops_per_token"] - alibi["model_flops_per_token"]
    assert more == 12 * 2 * 32 * 16
    assert np.isfinite([alibi["seconds"], sinusoidal["seconds"]]).all()
