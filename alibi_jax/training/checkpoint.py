"""Checkpoints of a run, through Orbax; the only file that knows it.

A checkpoint holds the whole state, the position in the data and the config. Every process writes
what its devices hold. Orbax writes under a temporary name and renames it, so that a directory named
by a step is always whole; should one be damaged later, the newest that every process can read is
used instead, on any mesh and any number of processes.

A process that cannot write its part raises at its next `check`, `save` or `wait`. The others, whose
threads wait for that part, then end with it (`distributed.end`).
"""

import concurrent.futures
import contextlib
import itertools
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from orbax.checkpoint import v1 as ocp

from alibi_jax.backend import is_out_of_memory
from alibi_jax.distributed import any_process, from_main, is_lost_peer, is_main
from alibi_jax.errors import UserError
from alibi_jax.training.state import TrainState
from alibi_jax.training.workdir import advice, checkpoint_steps, is_odd

_STATE = "state"
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of what is being written or removed


class Restored(NamedTuple):
    """What a checkpoint held, and the newer ones that could not be read."""

    step: int
    state: TrainState
    position: dict[str, Any]  # of the data iterator
    config: dict[str, Any] | None  # of the run when it was saved
    unreadable: dict[Path, str]  # where newer, damaged checkpoints are now, and what was wrong


class Checkpointer:
    """Writes checkpoints `DIR/STEP` in the background and keeps the newest few, and two others.

    Use it in a `with`, whose end waits for the last one: except where one of several processes has
    met an error, since the part of another may never come.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        config: dict[str, Any] | None = None,
        *,
        keep_best: bool = False,
        keep_step: int | None = None,
    ):
        """Makes the directory and frees it of what a killed run left half done.

        Args:
          directory: of the checkpoints.
          keep: how many of the newest.
          config: kept in every checkpoint, to tell what it is of.
          keep_best: whether that of the lowest validation loss is kept as well.
          keep_step: a step whose checkpoint is kept as well; None: no other.
        """
        _quiet()
        self._directory, self._keep, self._config = directory, keep, config
        self._keep_best, self._keep_step = keep_best, keep_step
        self._name = contextlib.ExitStack()
        with self._writing():
            steps, losses = from_main(self._prepare)
            self._plain = self._name.enter_context(_plain_name(directory))
        self._latest: int | None = max(steps, default=None)
        self._losses: dict[int, float] = dict(losses)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        wait = kind is None or jax.process_count() == 1
        self._thread.shutdown(wait)
        if wait:
            with self._name:
                self.wait()

    @property
    def latest(self) -> Path | None:
        """The newest finished checkpoint; waits for the one that is being written."""
        self.wait()
        return None if self._latest is None else self._directory / str(self._latest)

    def is_best(self, validation_loss: float) -> bool:
        """Whether no checkpoint has a validation loss as low."""
        return validation_loss < min(self._losses.values(), default=math.inf)

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts to save; arrays are copied before it returns. Does nothing if step is saved."""
        self.wait()
        if step == self._latest:
            return
        about: dict[str, Any] = {"position": position, "config": self._config}
        if validation_loss is not None and math.isfinite(validation_loss):
            about["validation_loss"] = self._losses[step] = validation_loss
        # What makes the directory fails here, before threads of Orbax wait for it.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        with self._writing(), ocp.Context(async_options=options):
            response = ocp.save_checkpointables_async(
                self._plain / str(step), {_STATE: state}, custom_metadata=about
            )
        self._pending = self._thread.submit(self._finish, step, response)

    def check(self) -> None:
        """Raises what went wrong in the background, if anything did so far; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._writing():
                self._latest = pending.result()

    def _prepare(self) -> tuple[list[int], list[tuple[int, float]]]:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(path)
        losses = validation_losses(metadata(self._directory))
        return checkpoint_steps(self._directory), list(losses.items())

    def _finish(self, step: int, response: ocp.AsyncResponse[None]) -> int:
        response.result()
        if is_main():
            steps = checkpoint_steps(self._directory)
            best = [(self._losses[step], step) for step in steps if step in self._losses]
            keep = {*steps[: self._keep], self._keep_step}
            if self._keep_best and best:
                keep.add(min(best)[1])
            for old in set(steps) - keep:
                path = self._directory / str(old)
                shutil.rmtree(path.rename(f"{path}{_UNFINISHED}"))
        return step

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for a full disk
            if is_lost_peer(error):
                raise
            raise UserError(
                f"cannot write a checkpoint in {self._directory} ({_reason(error)}): "
                f"{advice(error)}"
            ) from error


def restore(
    directory: Path,
    abstract: TrainState,
    *,
    steps: Sequence[int] | None = None,
    repair: bool = True,
) -> Restored | None:
    """Reads the newest checkpoint that can be read, with the shardings of `abstract`.

    Args:
      directory: of the checkpoints.
      abstract: shapes, dtypes and shardings of the state.
      steps: of the checkpoints to try, newest first; None: of all.
      repair: whether damaged ones are moved out of the way, next to the directory. Not where
        another process may be writing and removing checkpoints.

    Returns:
      None if there is no checkpoint.

    Raises:
      UserError: there are checkpoints, and none can be read.
    """
    _quiet()
    damaged: dict[Path, str] = {}
    for step in from_main(lambda: checkpoint_steps(directory)) if steps is None else steps:
        path = directory / str(step)
        reason = None
        try:
            state, about = _read(path, abstract)
        except (PermissionError, MemoryError) as error:  # not damaged: must not be moved
            raise UserError(f"cannot read checkpoint {path} ({_reason(error)})") from error
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged one
            if is_out_of_memory(error):
                raise
            if not repair and not path.exists():
                continue  # removed as it was read
            reason = _reason(error)
        if any_process(reason is not None):
            damaged[path] = reason or "another process cannot read it"
            continue
        if not repair:
            return Restored(step, state, about["position"], about.get("config"), damaged)
        moved = from_main(
            lambda: [[str(set_aside(path, "unreadable")), damaged[path]] for path in damaged]
        )
        unreadable = {Path(path): reason for path, reason in moved}
        return Restored(step, state, about["position"], about.get("config"), unreadable)
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoint(s) in {directory} can be read "
            f"({next(iter(damaged.values()))})"
            + ("; start again in another --workdir" if repair else "")
        )
    return None


def metadata(directory: Path) -> dict[int, dict[str, Any]]:
    """What stands beside the state in every checkpoint, newest first; {} where that is damaged.

    "position" in the data, "config" of the run and, if it was measured, "validation_loss".
    """
    _quiet()
    found: dict[int, dict[str, Any]] = {}
    for step in checkpoint_steps(directory):
        try:
            with _alone(directory) as plain:
                found[step] = _about(plain / str(step))
        except Exception:  # of many kinds; whoever reads the checkpoint will tell
            found[step] = {}
    return found


def validation_losses(found: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """The validation losses that there are in `metadata`."""
    name = "validation_loss"
    return {step: about[name] for step, about in found.items() if name in about}


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """The plain name of a directory, to read there: no process waits for one that meets damage."""
    here = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    with ocp.Context(multiprocessing_options=here), _plain_name(directory) as plain:
        yield plain


def _about(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the state."""
    about = ocp.metadata(path).custom_metadata
    if not about or "position" not in about:
        raise ValueError("it does not say what it is of")
    return about


def _read(path: Path, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state and what stands beside it; together all that resuming needs."""
    with _alone(path.parent) as plain:
        about = _about(plain / path.name)
        state = ocp.load_checkpointables(plain / path.name, {_STATE: abstract})[_STATE]
    return state, about


@contextlib.contextmanager
def _plain_name(directory: Path) -> Iterator[Path]:
    """The absolute path of a directory, or another name of it, of this process, if it `is_odd`."""
    path = directory.absolute()
    if not is_odd(path):
        yield path
        return
    file = os.open(path, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def _quiet() -> None:
    """Orbax logs every save, and the traceback of every error that it raises as well."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200]


def set_aside(path: Path, why: str) -> Path:
    """Moves a checkpoint out of the directory, to a name that is free and begins with `why`."""
    name = path.parent.parent / f"{why}-{path.name}"
    others = (name.with_name(f"{name.name}-{number}") for number in itertools.count(2))
    return path.rename(next(new for new in itertools.chain([name], others) if not new.exists()))
