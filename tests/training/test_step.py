"""One step: the same for any number of microbatches, in place, without a look at the host."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alibi_jax.attention import attention
from alibi_jax.config import OptimizerConfig
from alibi_jax.models import DecoderConfig, block
from alibi_jax.sharding import MeshConfig, make_mesh, spec
from alibi_jax.training import loop
from alibi_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alibi_jax.training.state import abstract_state, init_state
from alibi_jax.training.step import make_loss_fn, make_train_step

SHAPES = [(8, 1, 1), (2, 2, 2)]
Z_LOSS = 1e-3
BATCH = ("tokens", "segment_ids", "token_bytes")
# Nearly SGD: where a gradient is small, Adam would turn its rounding into whole steps.
OPTIMIZER = OptimizerConfig(
    learning_rate=1.0, schedule="constant", warmup_steps=0, beta1=0.0, beta2=0.0, epsilon=1.0
)


@functools.cache
def compiled(shape, parts, dropout):
    """Mesh, structure, initial state on the host, abstract state and the compiled step.

    Compiled ahead, as a run's is: it refuses a state that is not what it was compiled for.
    """
    model = DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, vocab_size=32, dropout=dropout)
    mesh, optimizer = make_mesh(MeshConfig(*shape)), make_optimizer(OPTIMIZER, 10)
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(model, optimizer, 0, mesh)
        step = make_train_step(
            graphdef,
            optimizer,
            learning_rate_schedule(OPTIMIZER, 10),
            z_loss=Z_LOSS,
            gradient_accumulation=parts,
            use_dropout=dropout > 0.0,
        )
        sharding = NamedSharding(mesh, spec("batch", None))
        ids = jax.ShapeDtypeStruct((8 * parts, 17), np.int32, sharding=sharding)
        program = step.lower(abstract, dict.fromkeys(BATCH, ids)).compile()
    return graphdef, mesh, abstract, sharding, program


@functools.cache
def initial_state():
    """Drawn once, on the host."""
    model, mesh = (
        DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, vocab_size=32),
        make_mesh(MeshConfig(8)),
    )
    with jax.set_mesh(mesh):
        state = init_state(model, make_optimizer(OPTIMIZER, 10), 0, mesh)[1]
    key = np.asarray(jax.random.key_data(state.key))
    return jax.tree.map(np.array, dataclasses.replace(state, key=key))


class Run:
    """A state and its step on a mesh."""

    def __init__(self, shape=(8, 1, 1), parts=1, dropout=0.0, step=0, key=None):
        self.graphdef, self.mesh, self.abstract, self.sharding, self.program = compiled(
            shape, parts, dropout
        )
        host = initial_state()
        data = host.key if key is None else np.asarray(jax.random.key_data(jax.random.key(key)))
        host = dataclasses.replace(
            host, step=np.int32(step), key=jax.random.wrap_key_data(jnp.asarray(data))
        )
        self.state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), host, self.abstract)

    def step(self, batch):
        """Takes a step; gives its metrics as numbers."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.program(self.state, self.place(batch))
        return {name: float(value) for name, value in metrics.items()}

    def place(self, batch):
        """Puts a batch on the devices."""
        return jax.device_put(batch, self.sharding)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(make_batch, to_numpy, shape, parts):
    # Every n-th sequence makes a microbatch; here each has another share of the targets.
    batches = [make_batch(seed, batch=8 * parts, padding=False) for seed in range(2)]
    for batch in batches:
        for part in range(parts):
            batch["segment_ids"][part::parts, 4 + 3 * part :] = 0
        targets = [int((batch["segment_ids"][part::parts] > 0).sum()) for part in range(parts)]
        assert len(set(targets)) == parts  # uneven: a mean of means would differ

    # The whole, as one microbatch: the same sequences in a step that does not split them.
    split, start = Run(shape, parts), to_numpy(Run(shape, parts).state.params)
    whole = Run(shape, parts)
    whole.program = whole_step(shape, parts)
    for batch in batches:
        expected, actual = whole.step(batch), split.step(batch)
        for name, value in expected.items():
            assert actual[name] == pytest.approx(value, rel=2e-5), name
    after, other = to_numpy(whole.state), to_numpy(split.state)
    assert after.keys() == other.keys()
    for path, value in after.items():
        np.testing.assert_allclose(other[path], value, rtol=2e-4, atol=2e-6, err_msg=path)
    moved = [
        np.abs(value - start[path]).max() for path, value in to_numpy(whole.state.params).items()
    ]
    assert max(moved) > 1e-2


def whole_step(shape, parts):
    graphdef, mesh, abstract, sharding, _ = compiled(shape, parts, 0.0)
    with jax.set_mesh(mesh):
        step = make_train_step(
            graphdef,
            make_optimizer(OPTIMIZER, 10),
            learning_rate_schedule(OPTIMIZER, 10),
            z_loss=Z_LOSS,
        )
        ids = jax.ShapeDtypeStruct((8 * parts, 17), np.int32, sharding=sharding)
        return step.lower(abstract, dict.fromkeys(BATCH, ids)).compile()


def test_meshes_agree(make_batch, to_numpy):
    runs = [Run(shape) for shape in SHAPES]
    metrics = [run.step(make_batch()) for run in runs]
    for name, value in metrics[0].items():
        assert metrics[1][name] == pytest.approx(value, rel=1e-4), name
    first, second = (to_numpy(run.state) for run in runs)
    for path, value in first.items():
        np.testing.assert_allclose(second[path], value, rtol=1e-4, atol=1e-6, err_msg=path)
    assert not runs[1].state.params["embedding"][...].sharding.is_fully_replicated


def test_metrics(make_batch):
    """They are those of the parameters before the step, in nats and without z_loss."""
    run, batch = Run(), make_batch()
    with jax.set_mesh(run.mesh):
        placed = run.place(batch)
        losses = make_loss_fn(run.graphdef)(
            run.state.params, placed["tokens"], placed["segment_ids"]
        )
    ids = batch["segment_ids"]
    mask = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
    metrics = run.step(batch)
    assert metrics["tokens"] == mask.sum()
    assert metrics["bytes"] == batch["token_bytes"][:, 1:][mask].sum()
    expected = float((np.asarray(losses) * mask).sum() / mask.sum())
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(1.0)
    assert metrics["grad_norm"] > 0
    assert int(run.state.step) == 1


def test_loss_decreases(make_batch):
    run, batch = Run(), make_batch(padding=False)
    losses = [run.step(batch)["loss"] for _ in range(8)]
    assert losses[0] == pytest.approx(np.log(32), rel=0.25)
    assert losses[-1] < losses[0] - 0.3


def test_batch_of_padding_is_finite(make_batch, to_numpy):
    run, batch = Run(), make_batch()
    batch["segment_ids"][:] = 0
    metrics = run.step(batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0.0
    assert all(np.isfinite(value).all() for value in to_numpy(run.state).values())


def test_state_is_donated(make_batch):
    run = Run()
    old = jax.tree.leaves(run.state)
    run.step(make_batch())
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))


@pytest.mark.parametrize("shape", SHAPES)
def test_shardings_and_dtypes_stay(make_batch, shape):
    """What a step returns is what `abstract_state` promises, so one executable serves all."""
    run = Run(shape)
    for _ in range(2):
        run.step(make_batch())
        pairs = zip(jax.tree.leaves(run.state), jax.tree.leaves(run.abstract), strict=True)
        for leaf, promised in pairs:
            assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype)
            assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)


def test_steps_stay_on_the_device(make_batch):
    run = Run(parts=2, dropout=0.5)
    batches = [run.place(make_batch(seed, batch=16)) for seed in range(4)]
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    )
    with jax.set_mesh(run.mesh), jax.transfer_guard("disallow"):
        for batch in batches:
            run.state, metrics = run.program(run.state, batch)
    assert compilations == []
    assert np.isfinite(float(metrics["loss"]))


def test_dropout(make_batch, to_numpy):
    batch = make_batch(padding=False)

    def loss(**state):
        return Run(dropout=0.5, **state).step(batch)["loss"]

    losses = [loss(step=step) for step in range(3)]
    assert len({*losses, loss(key=7)}) == 4  # the same parameters, another step or key
    assert [loss(step=step) for step in range(3)] == losses
    runs = [Run(dropout=0.5) for _ in range(2)]
    for run in runs:
        for _ in range(2):
            run.step(batch)
    first, second = (to_numpy(run.state) for run in runs)
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)


def test_dropout_differs_between_microbatches(make_batch):
    """The same sequences, as the first microbatch alone and as the second alone."""
    half, losses = make_batch(padding=False), []
    for part in range(2):
        batch = {name: np.zeros((16, 17), np.int32) for name in half}
        for name, value in half.items():
            batch[name][part::2] = value
        losses.append(Run(parts=2, dropout=0.5).step(batch)["loss"])
        assert Run(parts=2).step(batch)["loss"] == pytest.approx(Run().step(half)["loss"], rel=1e-5)
    assert losses[0] != losses[1]


def test_seed_decides_the_parameters(to_numpy):
    model = DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, vocab_size=32)

    def params(shape, seed):
        mesh = make_mesh(MeshConfig(*shape))
        with jax.set_mesh(mesh):
            state = init_state(model, make_optimizer(OPTIMIZER, 10), seed, mesh)[1]
        return to_numpy(state.params)

    first, second, third = params(SHAPES[0], 0), params(SHAPES[1], 0), params(SHAPES[0], 1)
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)  # whatever the mesh
    assert any((third[path] != value).any() for path, value in first.items())


def test_one_segment_needs_no_segment_ids():
    model = DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, vocab_size=32)
    mesh, optimizer = make_mesh(MeshConfig(8)), make_optimizer(OPTIMIZER, 10)
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 32, (8, 17), dtype=np.int32),
        "segment_ids": np.ones((8, 17), np.int32),
        "token_bytes": np.ones((8, 17), np.int32),
    }
    after = []
    with jax.set_mesh(mesh):
        for one_segment in (False, True):
            graphdef, state = init_state(model, optimizer, 0, mesh)
            schedule = learning_rate_schedule(OPTIMIZER, 10)
            step = make_train_step(graphdef, optimizer, schedule, one_segment=one_segment)
            placed = jax.device_put(batch, NamedSharding(mesh, spec("batch", None)))
            state, metrics = step(state, placed)
            after.append((state.params, metrics))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), *after)


@pytest.mark.parametrize(("packing", "given"), [("documents", True), ("stream", False)])
def test_who_gets_segment_ids(monkeypatch, config, changed, meshes, packing, given):
    """A stream of text must reach attention without, since cuDNN takes none."""
    seen = []

    def record(*arrays, segment_ids, **options):
        seen.append(segment_ids is not None)
        return attention(*arrays, segment_ids=segment_ids, **options)

    monkeypatch.setattr(block, "attention", record)
    mesh = meshes[8, 1, 1]
    with jax.set_mesh(mesh):
        loop.lower_step(changed(config, data={"packing": packing}), mesh)
    assert seen and set(seen) == {given}
