"""A batch that gives no finite gradient: passed over, as if it had not been drawn.

In the way that large runs train: bfloat16 products, microbatches, scanned layers computed again.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from alibi_jax.config import OptimizerConfig
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import MeshConfig, make_mesh, spec
from alibi_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alibi_jax.training.state import init_state
from alibi_jax.training.step import make_train_step

# A schedule that moves at every step, and no weight decay, which would be nan for the bad row.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, schedule="linear", warmup_steps=0, weight_decay=0.0, final_fraction=0.0
)
MODEL = DecoderConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    vocab_size=32,
    tie_embeddings=False,  # so that a row of the embedding is in no step that does not read it
    dtype="bfloat16",
    remat="dots",
)
BAD = 31  # the token whose embedding is infinite


@functools.cache
def compiled(skip_nonfinite):
    """Mesh, initial state on the host with its shardings, sharding of a batch, and a step."""
    mesh, optimizer = make_mesh(MeshConfig(2, 2, 2)), make_optimizer(OPTIMIZER, 10)
    with jax.set_mesh(mesh):
        graphdef, state = init_state(MODEL, optimizer, 0, mesh)
        step = make_train_step(
            graphdef,
            optimizer,
            learning_rate_schedule(OPTIMIZER, 10),
            gradient_accumulation=2,
            skip_nonfinite=skip_nonfinite,
        )
        sharding = NamedSharding(mesh, spec("batch", None))
        ids = jax.ShapeDtypeStruct((8, 17), np.int32, sharding=sharding)
        batch = dict.fromkeys(("tokens", "segment_ids", "token_bytes"), ids)
        program = step.lower(state, batch).compile()
    embedding = np.array(state.params["embedding"])
    embedding[BAD] = np.inf
    params = state.params | {
        "embedding": jax.device_put(embedding, state.params["embedding"].sharding)
    }
    state = dataclasses.replace(state, params=params)
    return mesh, jax.device_get(state.params), state, sharding, program


class Run:
    """A state and its step."""

    def __init__(self, skip_nonfinite=True):
        self.mesh, _, state, self.sharding, self.program = compiled(skip_nonfinite)
        self.state = jax.tree.map(lambda x: x.copy(), state)  # the step consumes it

    def step(self, seed, bad=False):
        """Takes a step on a batch of its own; gives its metrics."""
        tokens = np.random.default_rng(seed).integers(0, BAD, (8, 17), dtype=np.int32)
        tokens[3, 5] = BAD if bad else tokens[3, 5]
        ones = np.ones_like(tokens)
        batch = {"tokens": tokens, "segment_ids": ones, "token_bytes": ones}
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.program(self.state, jax.device_put(batch, self.sharding))
        return {name: float(value) for name, value in metrics.items()}

    def miss_a_step(self):
        """What is left of a step that is passed over: its number, and the schedule's."""

        def advance(node):
            return node._replace(count=node.count + 1) if is_schedule(node) else node

        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            opt_state=jax.tree.map(advance, self.state.opt_state, is_leaf=is_schedule),
        )


def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)


def same(to_numpy, state, other):
    first, second = to_numpy(state), to_numpy(other)
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)


def test_a_bad_batch_is_passed_over(to_numpy):
    run, other = Run(), Run()
    for seed, bad in enumerate((False, True, True, False, False)):
        metrics = run.step(seed, bad)
        assert metrics["skipped"] == float(bad)
        assert np.isfinite(metrics["loss"]) == np.isfinite(metrics["grad_norm"]) == (not bad)
        if bad:
            other.miss_a_step()
        else:
            assert other.step(seed) == metrics  # the learning rate's too
        same(to_numpy, other.state, run.state)
    assert int(run.state.step) == 5
    finite = to_numpy(run.state)
    assert not np.isfinite(finite[".params['embedding']"][BAD]).any()
    finite[".params['embedding']"][BAD] = 0.0
    assert all(np.isfinite(value).all() for value in finite.values())


def test_good_batches_are_as_without_it(to_numpy):
    run, plain = Run(), Run(skip_nonfinite=False)
    for seed in range(3):
        metrics, expected = run.step(seed), plain.step(seed)
        assert metrics.pop("skipped") == 0.0 and "skipped" not in expected
        assert metrics == pytest.approx(expected, rel=1e-5)
    first, second = to_numpy(plain.state), to_numpy(run.state)
    for path, value in first.items():
        np.testing.assert_allclose(second[path], value, rtol=1e-3, atol=1e-5, err_msg=path)
    plain.step(3, bad=True)  # and without it, one bad batch is the end
    assert all(np.isnan(value).all() for value in to_numpy(plain.state.params["head"]).values())


def test_state_is_donated():
    run = Run()
    old = jax.tree.leaves(run.state)
    run.step(0, bad=True)
    assert all(leaf.is_deleted() for leaf in old)


def test_parameters_and_moments_are_float32_and_take_small_steps(to_numpy):
    """An update of 1e-3 on a scale of 1 is lost in bfloat16, whose next number is 1 - 2^-8."""
    run = Run()
    before = to_numpy(run.state.params)
    run.step(0)
    for leaf in jax.tree.leaves((run.state.params, run.state.opt_state)):
        assert leaf.dtype in (np.float32, np.int32)
    scales = {path: value for path, value in before.items() if "scale" in path}
    assert len(scales) == 3
    for path, value in to_numpy(run.state.params).items():
        if path in scales:
            moved = np.abs(value - scales[path])
            assert 1e-5 < moved.max() < 2.0**-8, path
