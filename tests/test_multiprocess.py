"""Several real processes on the loopback address train as one.

They do what this one process does, which has eight virtual devices. An undisturbed run of one and
one of two processes serve several tests.
"""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from alibi_jax.config import load_config
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training import checkpoint
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import abstract_state
from alibi_jax.training.workdir import checkpoint_steps
from tests.disks import disk as disk
from tests.texts import draw_words, write_texts
from tests.trainings import CONFIG, last_step, load_train, metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("ALIBI_JAX_KILLS", "3"))  # of the last test; each costs a start
STEPS = max(60, 6 * KILLS)


class Processes:
    """`python train.py` as several processes; use it in a `with`, which leaves none behind.

    They find each other through flags, or as SLURM's `srun` would start them. Each has `devices`.
    """

    def __init__(self, folder, count, workdir, *flags, script="train.py", devices=1, slurm=False):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, str(script)),
                    *(f"--config={folder / 'config.py'}", f"--workdir={workdir}"),
                    *([] if slurm else self._flags(count, index, port)),
                    *flags,
                ],
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": str(ROOT),
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                }
                | (self._srun(count, index, port) if slurm else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    @staticmethod
    def _flags(count, index, port):
        return [
            f"--distributed.coordinator_address=localhost:{port}",
            f"--distributed.num_processes={count}",
            f"--distributed.process_id={index}",
        ]

    @staticmethod
    def _srun(count, index, port):
        return {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_PORT": str(port),
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait(self, timeout=900):
        """Exit codes, and what each process printed on stdout and stderr, without Gloo's notes."""
        deadline = time.monotonic() + timeout
        outputs = [
            process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            for process in self.processes
        ]
        outs = [without_gloo(out) for out, _ in outputs]
        return [process.returncode for process in self.processes], outs, [err for _, err in outputs]


def without_gloo(text):
    """Without what Gloo's threads write about their peers, a few words at a time, all at once."""
    phrases = (
        r"\[Gloo\] Rank ",
        r" is connected to ",
        r" peer ranks\. ",
        r"Expected number of connected peer ranks is : ",
    )
    lines = re.sub("|".join(phrases), "", text).splitlines(True)
    return "".join(line for line in lines if re.search(r"[^\d\s]", line))


def test_what_gloo_threads_write_at_once_is_left_out():
    """Two threads took turns within a line, as was seen."""
    torn = (
        "[Gloo] Rank [Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer "
        "ranks is : 1\n0 is connected to 1 peer ranks. Expected number of connected peer ranks is "
        ": 1\n"
    )
    assert without_gloo(f"{torn}stopped at step 15\n{torn}") == "stopped at step 15\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.py").write_text(
        CONFIG.format(folder=folder, steps=STEPS)
        .replace("checkpoint_every=10", "checkpoint_every=5, log_every=1")
        .replace("validate_every=50", "validate_every=20")
    )
    rng = random.Random(0)
    write_texts(folder / "text", rng, draw_words(rng))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """A run of this one process."""
    arguments = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'alone'}"]
    arguments.append("--config.training.keep_checkpoints=100")
    assert load_train().main(arguments) == 0
    return folder / "alone"


@pytest.fixture(scope="module")
def pair(folder):
    """An undisturbed run of two processes: its directory, and what they printed."""
    with Processes(folder, 2, folder / "pair") as processes:
        codes, outs, errs = processes.wait()
    assert codes == [0, 0], errs
    return folder / "pair", outs, errs


def wait_for_step(processes, workdir, step):
    """Waits as long as all processes live."""
    while last_step(workdir) < step:
        if any(process.poll() is not None for process in processes.processes):
            raise AssertionError("\n".join(processes.wait()[2])[-3000:])
        time.sleep(0.02)


def same_curve(folder, other):
    """All losses agree, up to the rounding of sums in another order."""
    lines, expected = metrics(folder), metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert len(lines) == STEPS + STEPS // 20
    for line, other_line in zip(lines, expected, strict=True):
        for name, value in line.items():
            assert value == pytest.approx(other_line[name], rel=1e-4), (line["step"], name)


def saved_state(folder, workdir):
    """{path: array} of the newest checkpoint, read by this process alone, and its step."""
    config = load_config(str(folder / "config.py"), {"model.vocab_size": "257"})
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config.model, make_optimizer(config.optimizer, STEPS), 0, mesh)
        restored = checkpoint.restore(workdir / "checkpoints", abstract)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if leaf.dtype == jax.random.key(0).dtype else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)
    }, restored.step


def bitwise_equal(folder, workdir, other):
    (first, step), (second, other_step) = (saved_state(folder, path) for path in (workdir, other))
    assert step == other_step == STEPS and first.keys() == second.keys()
    for path, value in first.items():
        assert value.tobytes() == second[path].tobytes(), path
    assert metrics(workdir) == metrics(other)
    results = [json.loads((path / "extrapolation.json").read_text()) for path in (workdir, other)]
    assert results[0]["protocols"] == results[1]["protocols"]


def test_two_processes_do_what_one_does(alone, pair):
    """So the order of the data does not depend on the number of processes."""
    workdir, outs, errs = pair
    same_curve(workdir, alone)
    results = [json.loads((path / "extrapolation.json").read_text()) for path in (workdir, alone)]
    for entries in zip(*(result["protocols"]["fixed_targets"] for result in results), strict=True):
        nats = [entry["nats_per_token"] for entry in entries]
        assert nats[0] == pytest.approx(nats[1], rel=1e-4)
    # Process 0 alone reports.
    assert (
        "2 × cpu (cpu) of 2 processes" in outs[0]
        and "validation loss" in outs[0]
        and "extrapolation.png" in outs[0]
    )
    assert outs[1] == "" and errs[1] == "" and f"{STEPS}/{STEPS}" in errs[0]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert not list(workdir.rglob("*.tmp")) + list(workdir.rglob("*orbax-checkpoint-tmp*"))


def test_four_processes_go_on_and_stop_together(folder, alone, tmp_path):
    """From what one process saved, on a mesh where they share rows; a signal to some stops all.

    Then one process goes on, on yet another mesh.
    """
    workdir = shutil.copytree(alone, tmp_path / "run")
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > 10:
            shutil.rmtree(path)
    (workdir / "extrapolation.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:10]))
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    with Processes(folder, 4, workdir, *mesh, devices=2) as processes:
        wait_for_step(processes, workdir, 15)
        processes.processes[2].send_signal(signal.SIGTERM)
        time.sleep(0.1)
        processes.processes[1].send_signal(signal.SIGTERM)
        codes, outs, errs = processes.wait()
    assert codes == [130] * 4, errs
    assert "resuming at step 10 of" in outs[0] and "4 processes" in outs[0]
    assert "saved; the same command goes on from there" in outs[0]
    assert outs[1:] == errs[1:] == [""] * 3
    stopped = int(outs[0].split("stopped at step ")[1].split(",")[0])
    assert 15 <= stopped < STEPS and last_step(workdir) == stopped
    assert saved_state(folder, workdir)[1] == stopped
    assert load_train().main([f"--config={folder / 'config.py'}", f"--workdir={workdir}"]) == 0
    same_curve(workdir, alone)


def test_two_devices_read_what_eight_saved(folder, alone, tmp_path):
    """Two processes, each with a shard of every array, read it and save it again."""
    copy = ROOT / "tests" / "copy_checkpoint.py"
    target = tmp_path / "checkpoints"
    flags = (f"--from={alone / 'checkpoints'}", f"--to={target}")
    with Processes(folder, 2, tmp_path, *flags, script=copy) as processes:
        codes, _, errs = processes.wait()
    assert codes == [0, 0], errs
    (first, step), (second, other_step) = (saved_state(folder, path) for path in (alone, tmp_path))
    assert step == other_step == STEPS and first.keys() == second.keys()
    for path, value in first.items():
        assert value.tobytes() == second[path].tobytes(), path


def test_another_run_ends_all_with_one_line(folder, alone):
    """What process 0 finds out ends the other too; SLURM's variables tell them apart."""
    with Processes(folder, 2, alone, "--config.training.seed=7", slurm=True) as processes:
        codes, outs, errs = processes.wait()
    assert codes == [2, 2]
    (line,) = "".join(errs).splitlines()
    assert line.startswith("error: --workdir=") and "config.training.seed=0, this one has 7" in line
    assert outs == ["", ""]


def the_error(codes, errs):
    """The line with which all of them end, as soon as they see it, with the same code."""
    assert codes == [2, 2], errs
    # The progress bar of process 0 may be left without the end of its line.
    (line,) = [x for x in "\n".join(errs).splitlines() if x.startswith("error: ")]
    assert "cannot write" in line and "free some space" in line
    return line


def test_full_disk(folder, alone, disk):
    """A real one, with room for a few checkpoints; with more room one process goes on."""
    disk.mount("size=512k")
    workdir = disk.path / "run"
    with Processes(folder, 2, workdir, "--config.training.keep_checkpoints=9") as processes:
        codes, _, errs = processes.wait()
    the_error(codes, errs)
    assert checkpoint_steps(workdir / "checkpoints")
    disk.mount("remount,size=16m")
    assert load_train().main([f"--config={folder / 'config.py'}", f"--workdir={workdir}"]) == 0
    same_curve(workdir, alone)


@pytest.mark.parametrize("index", [0, 1])
def test_full_disk_of_one_process(folder, tmp_path, index):
    """The other waits for its part of a checkpoint; a limit on the size of files stands for it."""
    shards = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
    with Processes(folder, 2, tmp_path, *shards) as processes:
        wait_for_step(processes, tmp_path, 1)
        resource.prlimit(processes.processes[index].pid, resource.RLIMIT_FSIZE, (0, 0))
        codes, _, errs = processes.wait()  # less than Orbax waits
    line = the_error(codes, errs)
    assert line in errs[index]
    assert index == 0 or "cannot write a checkpoint" in line


def test_killed_and_resumed(folder, pair, tmp_path):
    """The same bits in the end, wherever a random process was killed.

    Once there are two checkpoints, the newest is damaged as well.
    """
    workdir, rng, damaged = tmp_path / "run", random.Random(KILLS), None
    share = (STEPS - 10) // KILLS
    for number in range(KILLS):
        victim, reached = rng.randrange(2), last_step(workdir)
        with Processes(folder, 2, workdir) as both:
            killed, survivor = both.processes[victim], both.processes[1 - victim]
            if number % 4 == 3:  # a random while after the start, but never at the end
                end = time.monotonic() + rng.uniform(0.0, 10.0)
                while time.monotonic() < end and last_step(workdir) < STEPS - 10:
                    time.sleep(0.01)
            else:
                target = min(reached + rng.randint(1, share), STEPS - 10)
                wait_for_step(both, workdir, target)
                time.sleep(rng.uniform(0.0, 0.1))
            started = last_step(workdir) > reached
            killed.kill()
            if not started:  # the other may still wait for it to join: the scheduler ends it
                survivor.kill()
            _, err = survivor.communicate(timeout=900)
        print(f"kill {number}: process {victim}, at step {last_step(workdir)}")
        assert killed.returncode == -signal.SIGKILL  # it was alive until then
        if started:
            assert survivor.returncode == 3, err[-3000:]
            line = err.strip().splitlines()[-1]
            assert line.startswith("error: ") and "process of this run was lost" in line
            assert "start all processes again with the same command" in line
        steps = checkpoint_steps(workdir / "checkpoints")
        if damaged is None and len(steps) >= 2:
            damaged = max(steps)
            for path in (workdir / "checkpoints" / str(damaged)).rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Processes(folder, 2, workdir) as processes:
        codes, _, errs = processes.wait()
    assert codes == [0, 0], errs
    assert damaged is not None and (workdir / f"unreadable-{damaged}").is_dir()
    bitwise_equal(folder, workdir, pair[0])
