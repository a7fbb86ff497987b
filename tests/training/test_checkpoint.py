"""What is saved comes back bit for bit, on any mesh, and damage costs one checkpoint at most."""

import dataclasses
import errno
import gc
import logging
import os
import shutil
import threading
import time
import warnings

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from alibi_jax import distributed
from alibi_jax.config import OptimizerConfig
from alibi_jax.errors import UserError
from alibi_jax.sharding import MESH_AXES
from alibi_jax.training.checkpoint import Checkpointer, restore
from alibi_jax.training.optimizer import make_optimizer
from alibi_jax.training.state import abstract_state
from alibi_jax.training.workdir import checkpoint_steps

# Reading damage leaves coroutines of Orbax and Zarr behind, which `quiet` collects here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIMIZER = OptimizerConfig(warmup_steps=0)
POSITION = {"next_index": 5, "nested": {"a": [1, 2]}}


@pytest.fixture(autouse=True)
def quiet():
    """Orbax's threads and files may be collected in any test: only ours may warn."""
    level = logging.getLogger("absl").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
    logging.getLogger("absl").setLevel(level)


def make(model, mesh, seed=0):
    """A state of random numbers, placed as a run's; without a compilation."""
    rng = np.random.default_rng(seed)

    def leaf(abstract):
        if jax.dtypes.issubdtype(abstract.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(seed), abstract.sharding)
        values = (100 * rng.standard_normal(abstract.shape)).astype(abstract.dtype)
        return jax.device_put(values, abstract.sharding)

    return jax.tree.map(leaf, make_abstract(model, mesh))


def make_abstract(model, mesh):
    with jax.set_mesh(mesh):
        return abstract_state(model, make_optimizer(OPTIMIZER, 10), 0, mesh)[1]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder, model, meshes):
    """Saves states of seeds 1, 2, ... as the checkpoints of steps 10, 20, ..."""

    def save(*steps, keep=10):
        with Checkpointer(folder, keep) as saver:
            for step in steps:
                state = make(model, meshes[8, 1, 1], step // 10)
                saver.save(step, state, POSITION | {"step": step})

    return save


def same(to_numpy, state, other):
    first, second = to_numpy(state), to_numpy(other)
    assert first.keys() == second.keys()
    for path, value in first.items():
        assert value.dtype == second[path].dtype, path
        np.testing.assert_array_equal(second[path], value, err_msg=path)


@pytest.mark.parametrize("target", [(8, 1, 1), (2, 2, 2)])
def test_round_trip(folder, saved, model, meshes, to_numpy, target):
    saved(10)
    abstract = make_abstract(model, meshes[target])
    restored = restore(folder, abstract)
    assert (restored.step, restored.unreadable) == (10, {})
    assert restored.position == POSITION | {"step": 10}
    same(to_numpy, make(model, meshes[8, 1, 1], 1), restored.state)
    pairs = zip(jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True)
    for leaf, promised in pairs:
        assert leaf.dtype == promised.dtype  # the key's too
        assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)


NAMES = [
    "exp [lr=1e-3]",
    "a*b?",
    "back\\slash",
    "back\\",
    "new\nline",
    "gs:",
    " spaces ",
    "-dash",
    255 * "x",
    os.fsdecode(b"latin-1 \xe9"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_name_that_the_file_system_allows(tmp_path, model, meshes, to_numpy, name):
    """Orbax reads some characters of a path as more than a name."""
    folder, mesh = tmp_path / name / "checkpoints", meshes[8, 1, 1]
    for step in (1, 2):
        with Checkpointer(folder, 1) as saver:
            saver.save(step, make(model, mesh, step), POSITION)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in folder.iterdir()] == ["2"]
    restored = restore(folder, make_abstract(model, mesh))
    assert (restored.step, restored.unreadable) == (2, {})
    same(to_numpy, make(model, mesh, 2), restored.state)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_fewer_devices(folder, saved, model, meshes, to_numpy, num_devices):
    """Eight devices saved it."""
    saved(10)
    devices = jax.devices()[:num_devices]
    shape = (1, num_devices) + (1,) * (len(MESH_AXES) - 2)
    abstract = make_abstract(model, jax.make_mesh(shape, MESH_AXES, devices=devices))
    state = restore(folder, abstract).state
    same(to_numpy, make(model, meshes[8, 1, 1], 1), state)
    assert all(len(leaf.sharding.device_set) == num_devices for leaf in jax.tree.leaves(state))


def test_nothing_to_restore(folder, model, meshes):
    abstract = make_abstract(model, meshes[8, 1, 1])
    assert restore(folder, abstract) is None
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    assert restore(folder, abstract) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(folder, saved, keep):
    saved(10, 20, 30, 40, keep=keep)
    assert sorted(int(path.name) for path in folder.iterdir()) == [10, 20, 30, 40][-keep:]


def test_saving_a_step_twice_is_once(folder, saved, model, meshes, to_numpy):
    saved(10)
    with Checkpointer(folder, 2) as saver:
        assert saver.latest == folder / "10"
        saver.save(10, make(model, meshes[8, 1, 1], 9), POSITION)
    state = restore(folder, make_abstract(model, meshes[8, 1, 1])).state
    same(to_numpy, make(model, meshes[8, 1, 1], 1), state)


def test_latest(folder, model, meshes):
    with Checkpointer(folder, 2) as saver:
        assert saver.latest is None
        saver.save(3, make(model, meshes[8, 1, 1]), POSITION)
        assert saver.latest == folder / "3"  # waits for the one being written


def largest(path):
    files = (file for file in path.rglob("*") if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)


def truncate(path):
    file = largest(path)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def truncate_to_nothing(path):
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def remove(name):
    return lambda path: (path / name).unlink()


def fill_with_zeros(path):
    file = largest(path)
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE = {
    "truncated": truncate,
    "truncated to nothing": truncate_to_nothing,
    "zeros": fill_with_zeros,
    "empty": empty,
    "no metadata": remove("_CHECKPOINT_METADATA"),
    "no metadata of arrays": remove("state/_METADATA"),
    "no manifest": remove("state/manifest.ocdbt"),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no arrays": lambda path: shutil.rmtree(path / "state" / "d"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_falls_back(folder, saved, model, meshes, to_numpy, damage):
    saved(10, 20, 30)
    damage(folder / "30")
    restored = restore(folder, make_abstract(model, meshes[8, 1, 1]))
    assert restored.step == 20 and restored.position["step"] == 20
    same(to_numpy, make(model, meshes[8, 1, 1], 2), restored.state)
    assert list(restored.unreadable) == [folder.parent / "unreadable-30"]
    assert next(iter(restored.unreadable)).is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_falls_back_over_several_and_again(folder, saved, model, meshes):
    abstract = make_abstract(model, meshes[8, 1, 1])
    saved(10, 20, 30)
    empty(folder / "30")
    truncate(folder / "20")
    restored = restore(folder, abstract)
    assert restored.step == 10
    assert [path.name for path in restored.unreadable] == ["unreadable-30", "unreadable-20"]
    # The step comes again and is damaged again: its name is taken.
    for number in (2, 3):
        saved(30)
        truncate(folder / "30")
        restored = restore(folder, abstract)
        assert restored.step == 10
        assert [path.name for path in restored.unreadable] == [f"unreadable-30-{number}"]
    saved(30)
    assert restore(folder, abstract).step == 30


def test_reading_beside_a_run_moves_nothing(folder, saved, model, meshes):
    """What was removed as it was read is not damaged."""
    abstract = make_abstract(model, meshes[8, 1, 1])
    saved(10, 20, 30)
    truncate(folder / "30")
    restored = restore(folder, abstract, repair=False)
    assert restored.step == 20 and list(restored.unreadable) == [folder / "30"]
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]
    assert restore(folder, abstract, steps=[50, 40], repair=False) is None
    assert restore(folder, abstract, steps=[50, 10], repair=False).unreadable == {}


def test_metadata_that_do_not_tell(folder, model, meshes):
    with Checkpointer(folder, 1) as saver:
        saver.save(10, make(model, meshes[8, 1, 1]), {})
    path = folder / "10" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"position"', '"elsewhere"'))
    with pytest.raises(UserError, match=r"can be read \(it does not say what it is of\); start"):
        restore(folder, make_abstract(model, meshes[8, 1, 1]))


def test_all_damaged(folder, saved, model, meshes):
    saved(10, 20)
    for path in folder.iterdir():
        empty(path)
    with pytest.raises(UserError, match=r"none of the 2 checkpoint.* another --workdir"):
        restore(folder, make_abstract(model, meshes[8, 1, 1]))
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]  # left for a person


def test_other_model_is_not_taken(folder, saved, model, meshes):
    saved(10)
    wider = dataclasses.replace(model, mlp_dim=128)
    with pytest.raises(UserError, match="none of the 1 checkpoint"):
        restore(folder, make_abstract(wider, meshes[8, 1, 1]))


def test_leftover_of_a_killed_save(folder, saved, model, meshes):
    saved(10)
    leftover = folder / "20.orbax-checkpoint-tmp"
    shutil.copytree(folder / "10", leftover)
    (leftover / "commit_success.txt").unlink(missing_ok=True)
    truncate(leftover)
    assert restore(folder, make_abstract(model, meshes[8, 1, 1])).step == 10
    (folder / "5.orbax-checkpoint-tmp").mkdir()  # of a removal
    with Checkpointer(folder, 2) as saver:
        assert sorted(path.name for path in folder.iterdir()) == ["10"]
        saver.save(20, make(model, meshes[8, 1, 1], 2), POSITION)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]
    assert restore(folder, make_abstract(model, meshes[8, 1, 1])).step == 20


def test_a_removal_cut_short(folder, saved, monkeypatch):
    """A directory named by a step is whole, even then."""

    def cut_short(path):
        largest(path).unlink()
        raise OSError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(UserError, match=r"cannot write a checkpoint in .*cut short"):
            saved(10, 20, keep=1)
    assert checkpoint_steps(folder) == [20]
    with Checkpointer(folder, 1) as saver:
        assert saver.latest == folder / "20"
    assert [path.name for path in folder.iterdir()] == ["20"]


def test_what_fails_in_the_background_is_told_soon(folder, model, meshes, monkeypatch):
    started = threading.Event()

    class Response:
        def result(self):
            started.wait()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *_, **__: Response())
    with Checkpointer(folder, 2) as saver:
        saver.save(10, make(model, meshes[8, 1, 1]), POSITION)
        saver.check()  # nothing to tell yet
        started.set()
        with pytest.raises(UserError, match="No space left on device"):
            for _ in range(1000):
                saver.check()
                time.sleep(0.01)


def test_arrays_are_copied_before_training_goes_on(folder, model, meshes, to_numpy):
    """The next step reuses the memory of the state that is still being written."""
    mesh = meshes[8, 1, 1]
    model = dataclasses.replace(model, vocab_size=4096, embed_dim=64)  # 3 MB: writing takes time
    abstract, state = make_abstract(model, mesh), make(model, mesh)
    step = jax.jit(
        lambda state: dataclasses.replace(
            state,
            step=state.step + 1,
            params=jax.tree.map(lambda x: 0.5 * x + 1.0, state.params),
            opt_state=jax.tree.map(lambda x: x + x, state.opt_state),
        ),
        donate_argnums=0,
    )
    copies = {}
    with Checkpointer(folder, 5) as saver:
        for number in range(1, 4):
            copies[number], old = to_numpy(state), jax.tree.leaves(state.params)
            saver.save(number, state, POSITION)
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
            assert all(leaf.is_deleted() for leaf in old)
    for number in (3, 2, 1):
        restored = restore(folder, abstract)
        assert restored.step == number
        actual = to_numpy(restored.state)
        for path, value in copies[number].items():
            np.testing.assert_array_equal(actual[path], value, err_msg=path)
        shutil.rmtree(folder / str(number))


def test_a_lost_process_is_not_a_full_disk(folder, model, meshes, monkeypatch):
    """JAX may raise ValueError for either."""
    saver, state = Checkpointer(folder, 2), make(model, meshes[8, 1, 1])

    def fail(*args, **kwargs):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    monkeypatch.setattr(ocp, "save_checkpointables_async", fail)
    monkeypatch.setattr(distributed, "_client", lambda: "one of several processes")
    with pytest.raises(ValueError, match=r"^UNKNOWN: Gloo") as caught:
        saver.save(1, state, POSITION)
    assert not isinstance(caught.value, UserError)


def test_no_folder(folder):
    folder.write_text("a file")
    with pytest.raises(
        UserError, match=r"cannot write a checkpoint in .* exists\): choose another directory$"
    ):
        Checkpointer(folder, 2)
