"""The command: from start to end, through every interruption, and whatever it is given."""

import importlib.util
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from alibi_jax.config import load_config
from alibi_jax.run import completed
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training import checkpoint, goodput
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import abstract_state
from tests.disks import disk as disk
from tests.texts import draw_words, write_texts

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 200
CONFIG = """
from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig


def get_config():
    return Config(
        model=DecoderConfig(num_layers=1, embed_dim=16, num_heads=2),
        data=DataConfig(
            source="files:{folder}/text/*.txt",
            sequence_length=16,
            batch_size=8,
            cache_dir="{folder}/cache",
        ),
        optimizer=OptimizerConfig(warmup_steps=10),
        training=TrainingConfig(
            num_steps={steps}, checkpoint_every=10, validate_every=50, validation_batches=2
        ),
        evaluation=EvaluationConfig(
            multiples=(1, 2), num_windows=4, num_targets=8, tokens_per_batch=256, num_bootstrap=100
        ),
    )
"""


def load_train():
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Command:
    """`python train.py` on one CPU device, with one config for all tests."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "config.py"
        self.file.write_text(CONFIG.format(folder=folder, steps=STEPS))
        rng = random.Random(0)
        write_texts(folder / "text", rng, draw_words(rng))
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Starting again compiles nothing again.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir, *flags, limit=None):
        """Starts a process; `limit` is the largest file in bytes that it may write."""
        command = [sys.executable, "train.py", f"--config={self.file}", f"--workdir={workdir}"]
        if limit is not None:
            command[:0] = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash"]
        return subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir, *flags, expect=0, limit=None):
        """Runs to the end; gives what was printed on stdout and on stderr."""
        process = self.start(workdir, *flags, limit=limit)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, err[-3000:]
        assert "Traceback" not in err, err[-3000:]
        return out, err


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("command"))


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


def metrics(folder):
    """The lines of metrics.jsonl, without what time decides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


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


def last_step(folder):
    """The last step in metrics.jsonl, which may be growing; 0 if there is none."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return max((json.loads(line)["step"] for line in whole), default=0)


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
    assert process.returncode == 0, err[-3000:]
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


# What follows starts no process but one: the command's function is called.


@pytest.fixture(scope="module")
def train():
    return load_train()


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(capsys, train, arguments, words):
    assert train.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    # A corpus that turns out to be bad has begun its progress bar.
    lines = [line for line in output.err.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if not line.startswith("tokenizing ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    assert words in lines[0], lines[0]
    assert "Traceback" not in output.err + output.out


VALUES = [
    # model
    ("model.num_layers=0", "config.model.num_layers=0: must be at least 1"),
    ("model.num_layers=two", "must be an integer"),
    ("model.num_heads=3", "embed_dim=16 is not a multiple of num_heads=3: change one"),
    ("model.num_kv_heads=4", "is not a multiple of num_kv_heads=4"),
    ("model.head_dim=0", "config.model.head_dim=0: must be at least 1"),
    ("model.dropout=1.0", "config.model.dropout=1.0: a probability, at least 0 and below 1"),
    ("model.slopes=1,2,3", "config.model.slopes has 3 values for num_heads=2: give one a head"),
    ("model.slopes=1,-2", "finite numbers, at least 0"),
    ("model.remat=true", "must be one of none, dots, full"),
    ("model.position=rope", "must be one of alibi, sinusoidal, learned"),
    ("model.bias_max=0", "config.model.bias_max=0.0: a finite number above 0"),
    ("model.vocab_size=10", "config.model.vocab_size=10 is less than the tokenizer's 257"),
    ("model.num_lay=1", "did you mean config.model.num_layers?"),
    ("model=big", "is a section: set one of its fields"),
    # data
    ("data.source=stdlb", "did you mean 'stdlib'?"),
    ("data.source=files:/nowhere/*.txt", "no file matches '/nowhere/*.txt'; check the path"),
    ("data.source=tfds:", "names nothing; write for instance"),
    ("data.tokenizer=bpe:12", "with a whole number of at least 257"),
    ("data.tokenizer=missing.json", "nor a file that exists"),
    ("data.packing=dense", "must be one of documents, stream"),
    ("data.sequence_length=0", "config.data.sequence_length=0: must be at least 1"),
    ("data.batch_size=0", "config.data.batch_size=0: must be at least 1"),
    ("data.batch_size=9", "config.data.batch_size=9 does not divide"),
    (
        "data.sequence_length=1000000 evaluation.tokens_per_batch=10000000",
        "evaluation needs 1000001",
    ),
    ("data.cache_dir=/dev/null/x", "cannot write"),
    # optimizer
    ("optimizer.learning_rate=0", "config.optimizer.learning_rate=0.0: must be above 0"),
    ("optimizer.learning_rate=nan", "must be a number"),
    ("optimizer.learning_rate=-1", "config.optimizer.learning_rate=-1.0: must be above 0"),
    ("optimizer.schedule=step", "must be one of cosine, linear, constant"),
    (
        "optimizer.warmup_steps=201",
        "is more than config.training.num_steps=200: warm up for at most",
    ),
    ("optimizer.beta2=1", "config.optimizer.beta2=1.0: must be at least 0 and below 1"),
    ("optimizer.clip_norm=1e999", "config.optimizer.clip_norm=inf: must be above 0"),
    # training
    ("training.num_steps=0", "config.training.num_steps=0: must be at least 1 and at most"),
    ("training.num_steps=1e3", "must be an integer"),
    ("training.num_steps=1000000000000", "must be at least 1 and at most 2147483647"),
    ("training.seed=-1", "config.training.seed=-1: must be at least 0 and at most 4294967295"),
    ("training.z_loss=2", "config.training.z_loss=2.0: must be at least 0.0 and at most 1.0"),
    ("training.gradient_accumulation=3", "use a multiple of 24"),
    ("training.on_nonfinite=ignore", "must be one of stop, skip"),
    ("training.keep_checkpoints=0", "config.training.keep_checkpoints=0: must be at least 1"),
    # evaluation
    ("evaluation.multiples=2,4", "must start with 1, the training length"),
    ("evaluation.multiples=1,2,3", "has 3 after 2: each must be a larger multiple"),
    ("evaluation.split=train", "must be one of valid, test"),
    ("evaluation.num_targets=9", "must be at least 1 and at most 8, half the training length"),
    ("evaluation.tokens_per_batch=16", "is less than one window of 32 tokens: raise it"),
    ("evaluation.num_bootstrap=10", "must be at least 100 for a 95% interval"),
    # mesh
    ("mesh.data=3", "which does not fill 8 device(s)"),
    ("mesh.tensor=16", "which does not fill 8 device(s)"),
    ("mesh.fsdp=0", "each size must be at least 1"),
    ("mesh.tensor=4", "config.model.num_heads=2 does not divide over 4 devices"),
    # neither
    ("modle.num_layers=1", "did you mean config.model?"),
    ("model.num_layers.x=1", "is a field, not a section"),
    ("data.source=a\nb", "is not known"),  # a line break in what is quoted
]


@pytest.mark.parametrize(("fields", "words"), VALUES, ids=[fields for fields, _ in VALUES])
def test_bad_value(command, train, capsys, tmp_path, fields, words):
    flags = [f"--config.{field}" for field in fields.split(" ")]
    base = [f"--config={command.file}", f"--workdir={tmp_path / 'run'}"]
    refused(capsys, train, [*base, *flags], words)
    assert tree(tmp_path) == {}


DISTRIBUTED = [
    "--config=missing.py",  # met only after these flags
    "--workdir=W",
    "--distributed.coordinator_address=localhost:8476",
    "--distributed.num_processes=2",
    "--distributed.process_id=1",
]
FLAGS = [
    (["--config=missing.py", "--workdir=W"], "--config=missing.py: no such file"),
    (["--workdir=W"], "--config is missing: give --config=FILE and --workdir=DIR"),
    (["--config=C"], "--workdir is missing: give --config=FILE and --workdir=DIR"),
    (["--config=C", "--workdir="], "--workdir is missing"),
    (["--config=C", "--workdir"], "--workdir needs a value: --workdir=VALUE"),
    (["--config=C", "--workdir=W", "--seed=1"], "--seed is not known: there is"),
    (["--config=C", "--workdir=W", "extra"], "extra is not known: there is"),
    (["--config=C", "--workdir=W", "--config.training.seed"], "needs a value"),
    (["--config=C", "--workdir=W", "--config.=1"], "does not exist: it has model, data"),
    (["--config=C", "--workdir=W", "--configs=1"], "--configs is not known"),
    (["--help", "--config=missing.py"], "no such file"),
    (["--config=C", "--workdir=W", "--profile=5"], "--profile=5: must be START:STOP"),
    (["--config=C", "--workdir=W", "--profile="], "--profile=: must be START:STOP"),
    (["--config=C", "--workdir=W", "--profile=9:9"], "with 0 <= START < STOP <= 200"),
    (["--config=C", "--workdir=W", "--profile=9:201"], "which is config.training.num_steps"),
    (DISTRIBUTED[:4], "--distributed.process_id missing: give all of --distributed.coordinator"),
    ([*DISTRIBUTED, "--distributed.process_id=2"], "process_id=2: must be less than --distr"),
    ([*DISTRIBUTED, "--distributed.process_id=-1"], "must be an integer of at least 0"),
    ([*DISTRIBUTED, "--distributed.num_processes=0"], "must be an integer of at least 1"),
    ([*DISTRIBUTED, "--distributed.coordinator_address=host"], "must be HOST:PORT, of process 0"),
    ([*DISTRIBUTED, "--distributed.coordinator_address=:8476"], "must be HOST:PORT, of process 0"),
    ([*DISTRIBUTED, "--distributed.port=1"], "--distributed.port does not exist: it has coord"),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS)
def test_bad_flags(command, train, capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    names = {"--config=C": f"--config={command.file}"}
    refused(capsys, train, [names.get(flag, flag) for flag in flags], words)
    assert tree(tmp_path) == {}


def test_help(command, train, capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert train.main(arguments) == 0
        assert "--config=configs/NAME.py[:VARIANT] --workdir=DIR" in capsys.readouterr().out
    assert train.main(["--help", f"--config={command.file}"]) == 0
    out = capsys.readouterr().out
    assert "--config.model.num_layers=1\n" in out and "--config.evaluation.multiples=1,2\n" in out


CONFIG_FILES = [
    ("def get_config(:", "fails with SyntaxError"),
    ("raise ValueError('two\\nlines')", "fails with ValueError: two lines; it must be Python"),
    ("x = 1", "has no function get_config(): define one"),
    ("def get_config():\n    return {'model': {}}", "get_config() returned dict, it must return"),
    ("def get_config():\n    return 1 / 0", "fails with ZeroDivisionError"),
]


@pytest.mark.parametrize(("text", "words"), CONFIG_FILES)
def test_bad_config_file(train, capsys, tmp_path, text, words):
    (tmp_path / "config.py").write_text(text)
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    refused(capsys, train, arguments, words)
    assert not (tmp_path / "run").exists()


TEXTS = [
    ("a.txt", b"", "no text is left for the split"),
    ("a.txt", b"too short", "no text is left for the split 'valid'; give more text"),
    ("a.txt", b"too short " * 20, "evaluation needs 17 tokens for one window of 16"),
    ("a.txt", b"text " * 99 + b"\xff", "not UTF-8 at byte 495"),
    ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
    ("a.jsonl", b'{"title": 1}\n', "no field 'text'"),
    ("a.txt.gz", b"not an archive", "not a whole .gz file"),
    ("a.pdf", b"%PDF", "allowed are .txt"),
]


@pytest.mark.parametrize(("name", "text", "words"), TEXTS)
def test_bad_text(command, train, capsys, tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text)
    arguments = [
        f"--config={command.file}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=files:{tmp_path}/a.*",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    refused(capsys, train, arguments, words)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_training_text_too_short(command, train, capsys, tmp_path):
    """Held-out text that is long enough, and a train split of less than a window."""
    for split, text in (("train", "ab"), ("valid", "words " * 99), ("test", "words " * 99)):
        (tmp_path / f"{split}.txt").write_text(text)
    arguments = [
        f"--config={command.file}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=files:{tmp_path}/{{split}}.txt",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    refused(capsys, train, arguments, "the train split of ")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def record(command):
    """config.json of a run of the command's config."""
    from alibi_jax import data
    from alibi_jax.training import workdir

    config = load_config(str(command.file), {})
    corpus = data.load_corpus(config.data)
    config = completed(config, corpus.tokenizer.vocab_size)
    stream = data.stream_identity(
        fingerprint=corpus.fingerprint,
        sequence_length=16,
        batch_size=8,
        seed=0,
        packing="documents",
    )
    workdir.claim(command.folder / "claimed", config, stream)
    return json.loads((command.folder / "claimed" / "config.json").read_text())


def other_data(record):
    record["stream"]["corpus"] = "other"


def other_model(record):
    record["config"]["model"]["num_layers"] = 7


def other_seed(record):
    record["config"]["training"]["seed"] = 7


RUNS = [
    (other_data, "holds a run on other data (corpus differs): choose another directory"),
    (other_model, "holds a run with config.model.num_layers=7, this one has 1: choose another"),
    (other_seed, "holds a run with config.training.seed=7, this one has 0: choose another"),
    (lambda record: record.clear(), "config.json there is damaged or not of this program"),
    ('{"config": {"mod', "config.json there is damaged or not of this program"),
    ("[]", "config.json there is damaged or not of this program"),
    (None, "holds checkpoints without the config.json that says what they are of: choose"),
]


@pytest.mark.parametrize(("change", "words"), RUNS)
def test_directory_of_another_run(command, train, record, capsys, tmp_path, change, words):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "10").mkdir(parents=True)
    record = json.loads(json.dumps(record))
    if callable(change):
        change(record)
    if change is not None:
        text = json.dumps(record) if callable(change) else change
        (folder / "config.json").write_text(text)
    before = tree(folder)
    refused(capsys, train, [f"--config={command.file}", f"--workdir={folder}"], words)
    after = tree(folder)
    after.pop(".lock")
    assert after == before


def test_directory_beyond_the_steps(command, train, record, capsys, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "150").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(record))
    arguments = [f"--config={command.file}", f"--workdir={folder}"]
    arguments += ["--config.training.num_steps=100"]
    refused(
        capsys, train, arguments, "holds a run at step 150, beyond config.training.num_steps=100"
    )
    assert json.loads((folder / "config.json").read_text()) == record


def test_no_directory(command, train, capsys, tmp_path):
    (tmp_path / "file").write_text("content")
    before = tree(tmp_path)
    for workdir, words in [
        (tmp_path / "file", "is a file: give a directory"),
        (tmp_path / "file" / "below", "choose another directory"),
        ("/proc/nothing/here", "choose another directory"),
        (tmp_path / ("x" * 300), "choose another directory"),
    ]:
        refused(capsys, train, [f"--config={command.file}", f"--workdir={workdir}"], words)
    assert tree(tmp_path) == before


def test_read_only_disk(command, train, capsys, disk):
    """The directory is new, or there."""
    disk.mount("size=64k")
    (disk.path / "run").mkdir()
    disk.mount("remount,ro")
    for workdir in (disk.path / "new", disk.path / "run"):
        flags = [f"--config={command.file}", f"--workdir={workdir}"]
        refused(capsys, train, flags, f"cannot be written in {workdir.parent}")


def test_one_line_from_the_process_too(command, tmp_path):
    out, err = command.run(tmp_path / "run", "--config.model.num_layer=1", expect=2)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: --config.model.num_layer")
    assert tree(tmp_path) == {}
