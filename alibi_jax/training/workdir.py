"""The working directory of a run: who it belongs to, and what may change when it is resumed."""

import contextlib
import errno
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from alibi_jax import distributed
from alibi_jax.config import Config
from alibi_jax.errors import UserError, require
from alibi_jax.files import write_text

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOCK, EVALUATION_LOCK = ".lock", ".evaluation.lock"

_SEEN_SECONDS = 60.0  # until every machine sees a new file of a shared disk

# What may differ when a run is resumed: nothing here changes what was trained so far.
RESUMABLE = (
    "model.scan_layers",
    "model.remat",
    "data.cache_dir",
    "training.num_steps",
    "training.log_every",
    "training.validate_every",
    "training.validation_batches",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.on_nonfinite",
    "evaluation.",
    "mesh.",
)


def claim(workdir: Path, config: Config, stream: dict[str, Any]) -> None:
    """Makes `workdir` if need be and writes its config, or checks that it holds this very run.

    Of several processes the first does so; the others check that theirs is the same run and that
    they see the same directory.

    Args:
      workdir: the directory.
      config: the run's config.
      stream: what identifies the stream of batches.

    Raises:
      UserError: it is not a directory, cannot be written, or holds another run.
    """
    record = json.loads(json.dumps({"config": config.to_dict(), "stream": stream}))
    first = distributed.from_main(lambda: _claim(workdir, config, record))
    for part, what in (("config", "config"), ("stream", "data")):
        require(
            record[part] == first[part],
            f"process {jax.process_index()} was started with another {what} than process 0: give "
            "all processes the same command and the same files",
        )
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (workdir / CONFIG).is_file():
        require(
            time.monotonic() < deadline,
            f"process {jax.process_index()} does not see what process 0 wrote in "
            f"--workdir={workdir}: give a directory that all processes share",
        )
        time.sleep(0.5)


def _claim(workdir: Path, config: Config, record: dict[str, Any]) -> dict[str, Any]:
    path = workdir / CONFIG
    check_usable(workdir)
    with writing(workdir):
        there = _read(path) if path.exists() else None
        newest = max(checkpoint_steps(workdir / CHECKPOINTS), default=None)
        if newest is not None:  # until then nothing would be lost by another config
            if there is not None:
                _check_same_run(workdir, there, record)
            require(
                path.exists(),
                f"--workdir={workdir} holds checkpoints without the {CONFIG} that says what they "
                "are of: choose another directory, or bring that file back",
            )
            require(
                newest <= config.training.num_steps,
                f"--workdir={workdir} holds a run at step {newest}, beyond "
                f"config.training.num_steps={config.training.num_steps}: give at least {newest}, "
                "or choose another directory",
            )
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=2) + "\n")
    return record


def check_usable(workdir: Path) -> None:
    """Raises UserError if no run can live in `workdir`, before anything is done for one."""
    with writing(workdir):
        require(
            not workdir.exists() or workdir.is_dir(),
            f"--workdir={workdir} is a file: give a directory, new or of a run to resume",
        )
        parent = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryDirectory(prefix=".alibi_jax-", dir=parent).cleanup()
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be written in {parent} ({error.strerror}): "
                f"{advice(error)}"
            ) from error
        require(
            jax.process_count() == 1 or not is_odd(workdir),
            f"--workdir={workdir}: several processes cannot save under a name with any of []*?:\\ "
            "or what cannot be printed: choose another directory",
        )


def is_odd(workdir: Path) -> bool:
    """Whether Orbax and TensorStore, given this path, could lose what they write.

    They match the whole of it as a pattern, take part of it for a URL, and refuse what is no UTF-8.
    """
    path = str(workdir.absolute())
    return not path.isprintable() or any(character in path for character in "[]*?:\\")


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, newest first; readable or not."""
    names = (path.name for path in directory.glob("*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def advice(error: Exception) -> str:
    """What to do where something could not be written."""
    full = (os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    space = "free some space or " if any(full) else ""
    return f"{space}choose another directory"


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one clear line."""
    try:
        yield
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:
        path = error.filename or workdir
        raise UserError(
            f"--workdir={workdir}: cannot write {path} ({error.strerror or error}): {advice(error)}"
        ) from error


@contextlib.contextmanager
def locked(workdir: Path, lock: str = LOCK) -> Iterator[None]:
    """Makes `workdir` and keeps others out; the system frees it if process 0 dies.

    `lock` names the file: `LOCK` is of runs, `EVALUATION_LOCK` of evaluations, which may read while
    a run goes on.
    """
    if not distributed.is_main():
        yield
        return
    with contextlib.ExitStack() as stack:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / lock).open("w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--workdir={workdir} is in use by another process: wait for it, or choose "
                    "another directory"
                ) from error
            except OSError as error:
                distributed.print_once(
                    f"--workdir={workdir} is on a disk without locks ({error.strerror}): see to it "
                    "that no other process writes there"
                )
        yield


def _read(path: Path) -> dict[str, Any]:
    """A record that `claim` wrote; raises UserError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["config"].keys() and record["stream"].keys():
            return record
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"--workdir={path.parent}: {CONFIG} there is damaged or not of this program: choose "
        "another directory"
    )


def _check_same_run(workdir: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    defaults = json.loads(json.dumps(Config().to_dict()))  # of fields newer than the run
    before, after = _flat(defaults) | _flat(there["config"]), _flat(now["config"])
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not name.startswith(RESUMABLE):
            raise UserError(
                f"--workdir={workdir} holds a run with config.{name}={before.get(name)}, this one "
                f"has {after.get(name)}: choose another directory, or the same value to resume"
            )
    for name, value in now["stream"].items():
        if there["stream"].get(name) != value:
            version = ", or the version that tokenized it so," if name == "corpus" else ""
            raise UserError(
                f"--workdir={workdir} holds a run on other data ({name} differs): choose another "
                f"directory, or bring back the data it was trained on{version} to resume"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
