"""The loop with a step that costs nothing: whatever happens, what is trained is the same."""

import json
import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alibi_jax.errors import UserError
from alibi_jax.training import checkpoint, loop, workdir
from alibi_jax.training.goodput import Clock
from alibi_jax.training.logs import Logs
from alibi_jax.training.state import TrainState
from tests.disks import disk as disk


class FakeRun:
    """A run of 8 steps whose "parameters" are a digest of the batches seen, in order."""

    def __init__(self, config, corpus, folder, mesh):
        self.config, self.corpus, self.folder, self.mesh = config, corpus, folder, mesh
        self.folder.mkdir(exist_ok=True)
        replicated = NamedSharding(mesh, PartitionSpec())

        def init():
            state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(4)}, {}, jax.random.key(0))
            return jax.device_put(state, replicated)

        @jax.jit
        def update(state, tokens):
            sums = jnp.sum(
                tokens.astype(jnp.float32).reshape(4, -1, out_sharding=PartitionSpec()), 1
            )
            w = 0.9 * state.params["w"] + 1e-4 * sums
            return TrainState(state.step + 1, {"w": w}, {}, state.key)

        def step(state, batch):
            self.before(int(state.step) + 1)
            with jax.set_mesh(mesh):
                state = update(state, jax.sharding.reshard(batch["tokens"], replicated))
            values = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1}
            values |= {"tokens": 128.0, "bytes": 128.0}
            values |= self.metrics.get(int(state.step), {})
            return state, {name: np.float32(value) for name, value in values.items()}

        self.before, self.metrics = lambda step: None, {}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), init()
        )
        self.program = loop.Program(
            state=abstract,
            init=init,
            step=step,
            loss_fn=lambda params, tokens, ids: jnp.ones((tokens.shape[0], tokens.shape[1] - 1)),
            batch_sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None)),
            temporary_bytes=0,
            compile_seconds=0.0,
        )

    def train(self, **options):
        """Trains or goes on training; gives the parameters and whether it is complete."""
        with jax.set_mesh(self.mesh):
            state, complete = loop.train(
                self.config, self.corpus, self.program, self.folder, **options
            )
        return int(state.step), np.array(state.params["w"]), complete

    @property
    def saved(self):
        """Steps that are saved."""
        folder = self.folder / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir()) if folder.exists() else []

    @property
    def metrics_file(self):
        """The lines of metrics.jsonl without what time decides."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.fixture
def make_run(config, corpus, changed, meshes, tmp_path):
    def make(name="run", **training):
        training = {"keep_checkpoints": 10} | training
        run_config = changed(config, training=training)
        return FakeRun(run_config, corpus, tmp_path / name, meshes[8, 1, 1])

    return make


@pytest.fixture
def undisturbed(make_run):
    run = make_run("undisturbed")
    step, params, complete = run.train()
    assert (step, complete) == (8, True) and np.abs(params).min() > 0
    assert run.saved == [2, 4, 6, 8]
    return params, run.metrics_file


def same(run, undisturbed):
    step, params, complete = run.train()
    assert (step, complete) == (8, True)
    np.testing.assert_array_equal(params, undisturbed[0])
    assert run.metrics_file == undisturbed[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stop_at", range(1, 9))
def test_stopped_in_a_step(make_run, undisturbed, stop_at, number):
    run = make_run()
    run.before = lambda step: os.kill(os.getpid(), number) if step == stop_at else None
    step, _, complete = run.train()
    assert (step, complete) == (stop_at, False)  # also at the last step: no evaluation follows
    assert run.saved[-1] == stop_at
    run.before = lambda step: None
    same(run, undisturbed)


@pytest.mark.parametrize("where", ["validation", "save"])
def test_stopped_outside_a_step(make_run, undisturbed, monkeypatch, where):
    """No checkpoint is due at step 4 when the signal comes in its validation."""
    run = make_run(checkpoint_every=100 if where == "validation" else 4)
    owner = Logs if where == "validation" else checkpoint.Checkpointer
    original = getattr(owner, where)

    def stop(self, step, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *arguments)

    monkeypatch.setattr(owner, where, stop)
    step, _, complete = run.train()
    assert (step, complete, run.saved) == (4, False, [4])
    monkeypatch.setattr(owner, where, original)
    same(run, undisturbed)


def test_second_signal_ends_at_once(make_run):
    run = make_run()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def before(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    run.before = before
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("fail_at", [1, 3, 4, 8])
def test_crash_goes_on_from_the_checkpoint(make_run, undisturbed, fail_at):
    run = make_run()

    def before(step):
        if step == fail_at:
            raise RuntimeError("crash")

    run.before = before
    with pytest.raises(RuntimeError, match="crash"):
        run.train()
    run.before = lambda step: None
    same(run, undisturbed)


@pytest.mark.parametrize(
    "extra", [{"checkpoint_every": 3}, {"keep_checkpoints": 1}, {"num_steps": 5}]
)
def test_what_may_change_changes_nothing(make_run, undisturbed, extra):
    run = make_run(**extra)
    run.train()
    run.config = make_run().config
    same(run, undisturbed)


def test_resuming_at_the_end_does_nothing(make_run, undisturbed, capsys):
    run = make_run()
    same(run, undisturbed)
    run.before = lambda step: pytest.fail("a step was taken")
    same(run, undisturbed)
    assert "resuming at step 8 of 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "metrics", "saved"),
    [
        (1, {"loss": math.nan}, []),
        (5, {"loss": math.nan}, [2, 4]),
        (5, {"loss": -math.inf}, [2, 4]),
        (5, {"grad_norm": math.inf}, [2, 4]),
        (4, {"loss": math.nan}, [2]),  # a checkpoint is due: it must not be written
        (6, {"loss": math.nan}, [2, 4]),  # and without a validation at that step
        (8, {"grad_norm": math.nan}, [2, 4, 6]),
    ],
)
def test_divergence(make_run, step, metrics, saved):
    run = make_run()
    run.metrics[step] = metrics
    with pytest.raises(loop.Diverged) as caught:
        run.train()
    message = str(caught.value)
    what = "the gradient is not finite" if "grad_norm" in metrics else "loss is"
    assert what in message and f"at step {step}:" in message and "\n" not in message
    where = run.folder / "checkpoints" / str(saved[-1]) if saved else None
    good = f"the last good checkpoint is {where}" if where else "there is no checkpoint yet"
    assert good in message
    assert run.saved == saved


def test_divergence_when_stopped(make_run):
    """The signal comes in the very step that diverges, which is reported late."""
    run = make_run(checkpoint_every=100, validate_every=0)
    run.metrics[5] = {"loss": math.nan}
    run.before = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
    with pytest.raises(loop.Diverged, match="at step 5"):
        run.train()
    assert run.saved == []


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoint(make_run, undisturbed, capsys):
    run = make_run()
    run.train()
    for path in (run.folder / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    same(run, undisturbed)
    out = capsys.readouterr().out
    assert f"a damaged checkpoint is now {run.folder / 'unreadable-8'} (" in out
    assert "): falling back to step 6" in out
    assert (run.folder / "unreadable-8").is_dir()


def test_the_best_is_kept(make_run):
    """Also where none was due, and beyond an interruption."""
    losses, now = [9.0, 5.0, 6.0, 7.0, 4.0, 8.0, math.nan, 5.0], [0]
    best = {"validate_every": 1, "checkpoint_every": 3, "keep_checkpoints": 1, "keep_best": True}
    run = make_run(**best)

    def before(step):
        now[0] = step
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    def loss_fn(params, tokens, ids):
        return jnp.full((tokens.shape[0], tokens.shape[1] - 1), losses[now[0] - 1])

    run.before, run.program = before, run.program._replace(loss_fn=loss_fn)
    assert run.train()[0] == 6
    assert run.saved == [5, 6]
    run.before = lambda step: now.__setitem__(0, step)
    assert run.train()[0] == 8
    assert run.saved == [5, 8]
    kept = checkpoint.validation_losses(checkpoint.metadata(run.folder / "checkpoints"))
    assert kept == {5: pytest.approx(4.0)}  # none was due at step 8, the last


WSD = {"schedule": "wsd", "decay_fraction": 0.25, "warmup_steps": 1}


def test_extending_a_run_that_decayed(make_run, changed, capsys):
    """It goes on from where its decay began, and ends as a run that was as long from the start.

    Of 8 steps 2 decay, so that the decay begins at step 6; of 12 steps at step 9.
    """
    short, long = make_run("short", validate_every=0), make_run("long", validate_every=0)
    often = {"checkpoint_every": 4, "keep_checkpoints": 1}
    for run, steps in ((short, 8), (long, 12)):
        run.config = changed(run.config, optimizer=WSD, training=often | {"num_steps": steps})
    _, expected, _ = long.train()
    assert long.saved == [9, 12]
    short.train()
    assert short.saved == [6, 8]
    capsys.readouterr()
    short.config = long.config
    step, params, complete = short.train()
    assert (step, complete, short.saved) == (12, True, [9, 12])
    np.testing.assert_array_equal(params, expected)
    assert short.metrics_file == long.metrics_file
    decayed = short.folder / "decayed-8"
    assert decayed.is_dir()
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"step 8 has a learning rate that decays from step 6 on: kept as {decayed}",
        "resuming at step 6 of 12",
    ]


def test_extending_without_a_checkpoint_from_before(make_run, changed):
    run = make_run(keep_checkpoints=1, validate_every=0)
    run.config = changed(run.config, optimizer=WSD)
    run.train()
    shutil.rmtree(run.folder / "checkpoints" / "6")
    run.config = changed(run.config, training={"num_steps": 12})
    with pytest.raises(UserError, match="decayed from step 6 on, and no checkpoint from before"):
        run.train()
    assert run.saved == [8]


def test_a_damaged_checkpoint_is_none_to_extend_from(make_run, changed):
    run = make_run(keep_checkpoints=1, validate_every=0)
    run.config = changed(run.config, optimizer=WSD)
    run.train()
    for path in (run.folder / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    run.config = changed(run.config, training={"num_steps": 12})
    with pytest.raises(UserError, match="decayed from step 6 on, and no checkpoint from before"):
        run.train()
    assert 8 in run.saved


@pytest.mark.parametrize(
    ("schedule", "rate"), [("linear", "0.508"), ("cosine", "0.458"), ("constant", None)]
)
def test_a_learning_rate_that_jumps_is_told(make_run, changed, capsys, schedule, rate):
    """Shares of the peak by the schedules' formulas, at step 8 of 8 and then of 13, warm-up 0.

    Linear: 1 - 0.8 * 8/13 = 0.508; cosine: 0.2 + 0.8 * (1 + cos(8/13 pi)) / 2 = 0.458.
    """
    run = make_run(validate_every=0)
    optimizer = {"schedule": schedule, "warmup_steps": 0, "final_fraction": 0.2}
    run.config = changed(run.config, optimizer=optimizer | {"learning_rate": 1.0})
    run.train()
    run.config = changed(run.config, training={"num_steps": 13})
    capsys.readouterr()
    run.train()
    out = capsys.readouterr().out
    line = f"learning rate at step 8: 0.2 under num_steps=8, {rate} under num_steps=13; "
    assert (line in out) == ("learning rate" in out) == (rate is not None)


def test_no_validation(make_run, corpus, changed):
    run = make_run(validate_every=0)
    run.program = run.program._replace(loss_fn=None)
    assert run.train()[0] == 8
    assert all("validation_loss" not in line for line in run.metrics_file)


def test_data_that_is_too_short(config, corpus, changed):
    loop.check_data(config, corpus)
    sizes = {name: len(getattr(corpus, name).tokens) for name in ("train", "valid")}
    assert sizes["valid"] < sizes["train"]
    between = changed(config, data={"sequence_length": sizes["valid"]})
    with pytest.raises(UserError, match=r"^the valid split of 'files:.* at most"):
        loop.check_data(between, corpus)
    loop.check_data(changed(between, training={"validate_every": 0}), corpus)
    with pytest.raises(UserError, match=r"^the train split of 'files:.* at most"):
        loop.check_data(changed(config, data={"sequence_length": sizes["train"]}), corpus)


def test_logs_that_cannot_be_written(make_run):
    run = make_run()
    (run.folder / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl .*\): choose another"):
        run.train()


BAD = {"loss": math.nan, "skipped": 1.0}


@pytest.mark.parametrize("stop_at", [None, 3, 4])
def test_skipped_steps_are_counted(make_run, stop_at):
    """Two in a row at a checkpoint, and one more; whether the run is stopped on the way or not."""
    run = make_run(on_nonfinite="skip", log_every=100)
    gradient = BAD | {"loss": 1.0, "grad_norm": math.inf}
    run.metrics |= {3: BAD, 4: gradient, 7: BAD, 8: {"skipped": 0.0}}
    if stop_at:
        run.before = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == stop_at else None
        assert run.train()[0] == stop_at
        run.before = lambda step: None
    assert run.train()[::2] == (8, True)
    counts = [(x["step"], x["skipped"]) for x in run.metrics_file if "skipped" in x]
    assert counts == [(3, 1), (4, 2), (7, 3), (8, 3)]
    assert run.saved == [2, 3, 4, 6, 8] if stop_at == 3 else [2, 4, 6, 8]


@pytest.mark.parametrize("good", [None, 6])
def test_skipping_has_an_end(make_run, capsys, good):
    run = make_run(on_nonfinite="skip", num_steps=18, checkpoint_every=5)
    run.metrics |= {step: BAD for step in range(4, 16) if step != good}
    if good:  # it starts the count again
        assert run.train()[0] == 18
        assert "step 15: loss is nan: skipped" in capsys.readouterr().out
        return
    with pytest.raises(loop.Diverged, match="nan at step 13, as 10 times in a row: stopped"):
        run.train()
    assert run.saved == [5, 10]


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
def test_profile(make_run, undisturbed):
    """Two steps are traced, and a run that resumes beyond them traces none."""
    run = make_run()
    run.before = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None
    assert run.train(profile=range(3, 5))[0] == 6
    traces = list((run.folder / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].parts[-4:-2] == ("plugins", "profile")
    planes = jax.profiler.ProfileData.from_file(str(traces[0])).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [3, 4]
    run.before = lambda step: None
    same(run, undisturbed)
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()
    run.train(profile=range(3, 5))
    assert list((run.folder / "profile").rglob("*.xplane.pb")) == traces


@pytest.mark.parametrize("profile", [range(7, 8), range(5, 7)])
def test_profile_ends_with_the_run(make_run, profile):
    run = make_run()
    run.metrics[6] = {"loss": math.nan} if profile.start == 5 else {}
    try:
        run.train(profile=profile)
    except loop.Diverged:
        assert profile.start == 5
    assert len(list((run.folder / "profile").rglob("*.xplane.pb"))) == 1


def test_goodput(make_run):
    run, clock = make_run(), Clock()
    run.before = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None
    run.train(clock=clock)
    for number in (1, 2):
        record = json.loads((run.folder / "goodput.json").read_text())
        assert record["sessions"] == number
        spent = record["seconds"]
        named = ("steps", "input", "checkpoint", "validation")
        assert all(spent[name] > 0 for name in named) and spent["evaluation"] == 0
        if number == 1:
            assert sum(spent.values()) <= sum(clock.seconds.values())
            run.before = lambda step: None
            first = spent
            run.train()
    assert all(spent[name] >= first[name] for name in spent) and spent["steps"] > first["steps"]


def test_validation_compiles_once_and_before_training(config, corpus, changed, meshes, tmp_path):
    compiled = []

    def listen(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration") and "losses" in fun_name:
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.set_mesh(meshes[2, 2, 2]):
            program = loop.compile_program(config, meshes[2, 2, 2])
            assert len(compiled) == 1
            loop.train(config, corpus, program, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert sum("validation_loss" in line for line in lines) == 2
    assert len(compiled) == 1


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("size", "some"), [(40, False), (100, True)])
def test_full_disk(make_run, undisturbed, disk, size, some):
    """A real one, with room for no checkpoint or for some; then it gets more."""
    disk.mount(f"size={size}k")
    run = make_run()
    run.folder = disk.path / "run"
    run.folder.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*: free some space") as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert bool(workdir.checkpoint_steps(run.folder / "checkpoints")) == some
    disk.mount("remount,size=16m")
    same(run, undisturbed)
