"""The command from start to end, and through every interruption."""

import json
import math
import pathlib
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from alibi_jax.config import load_config
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training import checkpoint, goodput
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import abstract_state
from tests.disks import disk as disk
from tests.trainings import STEPS, last_step, metrics
from tests.trainings import command as command


@pytest.fixture(scope="module")
def finished(command):
    """A run that nothing disturbed, and what it printed."""
    folder = command.folder / "finished"
    return folder, *command.run(folder)


def saved_state(command, folder):
    """{path: array} of the newest checkpoint, which must be that of the last step."""
    config = load_config(str(command.file), {"model.vocab_size": "257"})
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config.model, make_optimizer(config.optimizer, STEPS), 0, mesh)
        restored = checkpoint.restore(folder / "checkpoints", abstract)
    assert (restored.step, restored.unreadable) == (STEPS, {})
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    arrays = {
        path: jax.random.key_data(leaf) if leaf.dtype == jax.random.key(0).dtype else leaf
        for path, leaf in arrays.items()
    }
    return {path: np.asarray(leaf) for path, leaf in arrays.items()}, restored.position


def same_run(command, folder, other):
    (first, position), (second, other_position) = (saved_state(command, f) for f in (folder, other))
    assert first.keys() == second.keys() and position == other_position
    assert any(np.abs(value).max() > 0 for value in first.values())
    for path, value in first.items():
        assert value.tobytes() == second[path].tobytes(), path
    assert metrics(folder) == metrics(other)
    results = [json.loads((f / "extrapolation.json").read_text()) for f in (folder, other)]
    assert results[0]["protocols"] == results[1]["protocols"]


@pytest.mark.slow
def test_end_to_end(command, finished):
    folder, out, err = finished
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "extrapolation.json",
        "extrapolation.png",
        "goodput.json",
    }
    assert not list(folder.rglob("*.tmp")) + list(folder.rglob("*orbax-checkpoint-tmp*"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["190", "200"]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "extrapolation.png").read_bytes().startswith(b"\x89PNG")

    result = json.loads((folder / "extrapolation.json").read_text())
    assert result.keys() >= {"train_length", "protocols", "verdict", "config", "versions"}
    assert result["train_length"] == 16 and result["verdict"]["text"]
    assert result["config"]["model"]["vocab_size"] == 257
    assert result["config"]["training"]["num_steps"] == STEPS
    assert result["versions"]["jax"] == jax.__version__
    assert result["protocols"].keys() == {"nonoverlapping", "fixed_targets"}
    for entries in result["protocols"].values():
        assert [entry["length"] for entry in entries] == [16, 32]
        for entry in entries:
            assert entry.keys() >= {"nats_per_token", "bits_per_byte", "interval"}
            # Bytes are tokens here, up to the separators between documents.
            bits = entry["nats_per_token"] / math.log(2)
            assert entry["bits_per_byte"] == pytest.approx(bits, rel=0.01)
            assert 0.5 < entry["nats_per_token"] < math.log(257)

    train = [line for line in metrics(folder) if "loss" in line]
    validation = [line for line in metrics(folder) if "validation_loss" in line]
    assert [line["step"] for line in train] == list(range(10, STEPS + 1, 10))
    assert [line["step"] for line in validation] == [50, 100, 150, 200]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    verdict = result["verdict"]["text"]
    spent = json.loads((folder / "goodput.json").read_text())["seconds"]
    assert all(spent[name] > 0 for name in goodput.ACTIVITIES)
    assert f"wall time {sum(spent.values()):,.1f} s, " in out
    for words in ("mesh", "parameters", "a step: p50", "validation loss", verdict[:30]):
        assert words in out
    assert f"{STEPS}/{STEPS}" in err


@pytest.mark.slow
def test_again_evaluates_to_the_same(command, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("extrapolation.json", "extrapolation.png"):
        (folder / name).unlink()
    out, _ = command.run(folder)
    assert f"resuming at step {STEPS} of {STEPS}" in out
    assert (folder / "extrapolation.png").is_file()
    same_run(command, folder, finished[0])


@pytest.mark.slow
def test_two_runs_are_bitwise_equal(command, finished, tmp_path):
    """Also where some steps of one are traced."""
    command.run(tmp_path / "run", "--profile=20:23")
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    same_run(command, tmp_path / "run", finished[0])


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        if last_step(folder) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("no step was taken")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(command, finished, tmp_path, number):
    folder = tmp_path / "run"
    process = command.start(folder)
    wait_for_step(process, folder, 30)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    assert "Traceback" not in err
    assert "saved; the same command goes on from there" in out
    stopped = int(out.split("stopped at step ")[1].split(",")[0])
    assert 30 <= stopped < STEPS
    assert (folder / "checkpoints" / str(stopped)).is_dir()
    assert not (folder / "extrapolation.json").exists()
    out, _ = command.run(folder)
    assert f"resuming at step {stopped} of {STEPS}" in out
    same_run(command, folder, finished[0])


@pytest.mark.slow
def test_killed_at_ten_moments(command, finished, tmp_path):
    """Four after a random time, six a random while after new steps; none when all but done."""
    folder, rng = tmp_path / "run", random.Random(0)
    moments = ["time", "step", "step", "time", "step", "step", "time", "step", "step", "time"]
    last_saved, reached = 0, []
    for moment in moments:
        process = command.start(folder)
        if moment == "time":
            # Wherever that is in its life; but a fast machine must not be done by then.
            end, far = time.monotonic() + rng.uniform(0.1, 6.0), min(last_saved + 40, STEPS - 20)
            while time.monotonic() < end and last_step(folder) < far:
                time.sleep(0.01)
        else:
            wait_for_step(process, folder, min(last_step(folder) + 10, STEPS - 20))
            time.sleep(rng.uniform(0.0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was alive until then
        steps = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()]
        assert max(steps, default=0) >= last_saved
        last_saved = max(steps, default=0)
        reached.append(last_saved)
    out, _ = command.run(folder)
    assert last_saved < STEPS and f"resuming at step {last_saved} of {STEPS}" in out
    assert len(set(reached)) >= 3, reached  # the kills were spread over training
    assert not list(folder.glob("unreadable-*"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["190", "200"]
    same_run(command, folder, finished[0])


@pytest.mark.slow
def test_diverged(command, tmp_path):
    flags = ("learning_rate=1e3", "weight_decay=1e3", "warmup_steps=0", "schedule=constant")
    folder, flags = tmp_path / "run", [f"--config.optimizer.{flag}" for flag in flags]
    _, err = command.run(folder, *flags, "--config.training.checkpoint_every=2", expect=1)
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and ": stopped; the last good checkpoint is " in line
    step = int(line.split(" at step ")[1].split(":")[0])
    good = pathlib.Path(line.split("checkpoint is ")[1].split(". ")[0])
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert good == folder / "checkpoints" / str(steps[-1]) and good.is_dir()
    assert steps[-1] == (step - 1) // 2 * 2
    assert not (folder / "extrapolation.json").exists()
    config = load_config(str(command.file), {"model.vocab_size": "257"})
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config.model, make_optimizer(config.optimizer, STEPS), 0, mesh)
        state = checkpoint.restore(folder / "checkpoints", abstract).state
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_skipping_does_not_hide_divergence(command, tmp_path):
    """A step of finite gradients makes parameters that have none any more: no batch will help."""
    flags = ("learning_rate=1e3", "weight_decay=1e3", "warmup_steps=0", "schedule=constant")
    folder, flags = tmp_path / "run", [f"--config.optimizer.{flag}" for flag in flags]
    out, err = command.run(folder, *flags, "--config.training.on_nonfinite=skip", expect=1)
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and ", as 10 times in a row: stopped; " in line
    step = int(line.split(" at step ")[1].split(",")[0])
    skipped = [line for line in out.splitlines() if line.endswith(": skipped")]
    assert [line.split(":")[0] for line in skipped[-9:]] == [
        f"step {step - n}" for n in range(9, 0, -1)
    ]
    assert metrics(folder)[-1]["step"] == step and metrics(folder)[-1]["skipped"] >= 10


@pytest.mark.slow
def test_full_disk(command, tmp_path):
    """A limit on the size of files stands for it."""
    _, err = command.run(tmp_path / "run", expect=2, limit=16 * 1024)
    last = err.splitlines()[-1]
    assert last.startswith("error: cannot write a checkpoint in ") and "free some space" in last


@pytest.mark.slow
def test_all_checkpoints_damaged(command, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[:32])
    _, err = command.run(folder, expect=2)
    # Orbax may leave a warning of its own about coroutines that it never awaited.
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: none of the 2 checkpoint(s) in ") and "another --workdir" in line
    assert "Traceback" not in err, err


@pytest.mark.slow
def test_in_use(command, tmp_path):
    folder = tmp_path / "run"
    # It must still be there when the other one has started, however fast the machine.
    process = command.start(folder, "--config.training.num_steps=1_000_000")
    wait_for_step(process, folder, 10)
    before = (folder / "config.json").read_text()
    _, err = command.run(folder, "--config.training.num_steps=300", expect=2)
    (line,) = err.splitlines()
    assert line.startswith("error: --workdir=") and "is in use by another process: wait" in line
    assert (folder / "config.json").read_text() == before
    process.kill()
    process.communicate()
