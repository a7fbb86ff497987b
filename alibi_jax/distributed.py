"""Several processes as one run: how they start, agree and end together.

JAX's own runtime does the work (`jax.distributed`, its coordination service and its detection of
clusters). With one process every function here does the obvious thing at no cost.

Process 0 alone prints and writes what is not sharded. What one process cannot go on from ends all
of them with the same exit code and one line (`end`): the failure is kept where all can see it, and
a thread in each looks there, because a process that waits for another in a collective would never
come to ask.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed  # for its client, as Orbax does: not public
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from alibi_jax.errors import UserError, require

T = TypeVar("T")

PEER_LOST = 3  # exit code
FLAGS = ("coordinator_address", "num_processes", "process_id")  # of jax.distributed.initialize

_HEARTBEAT_SECONDS = 40  # without a sign of life a process counts as lost
_START_SECONDS = 300  # for all processes to come
_LOOK_SECONDS = 2.0  # between looks for failures of others
_LEAVE_SECONDS = 5.0  # for the others to see a failure before the coordinator goes
_FAILURE, _LEFT = "alibi_jax/failure", "alibi_jax/left"  # folders of the coordination service
_AGAIN = "start all processes again with the same command, which goes on from the last checkpoint"
_LOST = f"error: another process of this run was lost: {_AGAIN}"
_ABORTED = f"error: JAX aborted, most likely because another process of this run was lost: {_AGAIN}"

_numbers = itertools.count()  # of values and barriers, the same in every process
_ending = threading.Lock()  # taken once, by whoever ends this process
_finished = threading.Event()


def initialize(flags: dict[str, str]) -> None:
    """Joins the processes of the run, if it has several; call it before JAX touches a device.

    Args:
      flags: values of `FLAGS` from the command line. Without any, JAX detects Cloud TPU, GKE, SLURM
        and Open MPI (and reads JAX_COORDINATOR_ADDRESS); elsewhere this process is alone.

    Raises:
      UserError: the flags do not make sense, or the coordinator's port is taken.
    """
    _quiet_libtpu()
    given = _parse(flags)
    if not given and not _in_cluster():
        return
    _check_port(given)
    # It would take SIGTERM, which the training loop handles together with Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    _on_abort(
        f"error: the processes of this run did not all come within {_START_SECONDS} seconds: start "
        "every one, with the same address of process 0 and the same number of processes"
    )
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"jax.distributed.initialize fails ({error}): give --distributed.{', '.join(FLAGS)}"
        ) from error
    _on_abort(_ABORTED)
    sys.excepthook = _end_after_traceback
    threading.Thread(target=_watch, daemon=True, name="watch for failures").start()


def is_main() -> bool:
    """Whether this is process 0, which alone prints and writes what is not sharded."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints on process 0."""
    if is_main():
        print(text, flush=True)


def from_main(function: Callable[[], T]) -> T:
    """Calls a function on process 0 and returns its value, which must be JSON, on every process.

    Every process must come here; the others wait as long as it takes.
    """
    if jax.process_count() == 1:
        return function()
    client, key = _client(), f"alibi_jax/value/{next(_numbers)}"
    if is_main():
        value = function()
        client.key_value_set(key, json.dumps(value))
        return value
    while True:  # in short waits, between which Python handles signals
        try:
            return json.loads(client.blocking_key_value_get(key, 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def main_first(function: Callable[[], T]) -> T:
    """Calls a function on process 0 and then on all others, which find on disk what it made."""
    values = []
    from_main(lambda: values.append(function()))
    return values[0] if values else function()


def wait_for_all() -> None:
    """Waits, for as long as it takes, until every process is here.

    Call it where processes may be far apart in time: the first collectives of a program give up
    after a short while.
    """
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"alibi_jax/barrier/{next(_numbers)}", 2**31 - 1)


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process; waits for all of them."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def make_vote(sharding: NamedSharding) -> Callable[[bool], bool]:
    """Returns `vote(flag)`: whether any process gave true, the same on all and without waiting.

    Every process calls it once a step. It says what was gathered a call earlier, by a computation
    that ran behind the step of that call; a single process hears of its own flag at once.

    Args:
      sharding: any on the mesh of the run.
    """
    if jax.process_count() == 1:
        return lambda flag: flag
    # One flag a device: over whichever axes, every process has a part of its own.
    sharding = NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
    gather = jax.jit(jnp.any)
    pending: list[jax.Array] = []

    def vote(flag: bool) -> bool:
        flags = np.full(jax.local_device_count(), flag)
        pending.append(gather(jax.make_array_from_process_local_data(sharding, flags)))
        return len(pending) > 1 and bool(pending.pop(0))

    return vote


def is_lost_peer(error: Exception) -> bool:
    """Whether an error of the runtime, of whatever type, says that another process is gone."""
    return _client() is not None and bool(
        re.search(r"Gloo|NCCL|UNAVAILABLE|heartbeat|Connection (closed|reset)", str(error))
    )


def end_lost(error: Exception) -> int:
    """`end`, because another process is gone: with the failure of that one if it said so."""
    return end(PEER_LOST, f"{_LOST} ({' '.join(str(error).split())[:300]})")


def end(code: int, line: str) -> int:
    """Prints the line on stderr and returns the code; several processes end, with one line of all.

    The first to come here prints; every other ends silently with the code of the first.
    """
    client = _client()
    if client is None:
        _say(line)
        return code
    _ending.acquire()
    ours = f"{code} {jax_distributed.global_state.process_id}"
    # Refused if another was first; it may also fail although it was done, or for want of a
    # coordinator: what is there then says who prints.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_FAILURE}/first", ours)
    first = ours
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        first = client.key_value_try_get(f"{_FAILURE}/first")
    _leave(int(first.split()[0]), line if first == ours else "")


def finish() -> None:
    """Waits for all processes, then frees what connects them; the last call of a whole run."""
    if _client() is None:
        return
    from_main(lambda: None)  # which may be writing its report
    _finished.set()
    jax.distributed.shutdown()


def _quiet_libtpu() -> None:
    """Keeps libtpu (extra `tpu`) from complaining where there is no TPU that it could open."""
    devices = Path("/dev")
    if not any(itertools.chain(devices.glob("accel*"), devices.glob("vfio/*"))):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _client() -> Any:
    return jax_distributed.global_state.client


def _parse(flags: dict[str, str]) -> dict[str, Any]:
    if not flags:
        return {}
    for name in flags:
        require(
            name in FLAGS,
            f"--distributed.{name} does not exist: it has {', '.join(FLAGS)}",
        )
    missing = [f"--distributed.{name}" for name in FLAGS if name not in flags]
    require(
        not missing or _in_cluster(),
        f"{', '.join(missing)} missing: give all of --distributed.{', '.join(FLAGS)}, or none",
    )
    numbers = {}
    for name, least in (("num_processes", 1), ("process_id", 0)):
        if name in flags:
            text = flags[name]
            require(
                text.isdecimal() and int(text) >= least,
                f"--distributed.{name}={text}: must be an integer of at least {least}",
            )
            numbers[name] = int(text)
    if len(numbers) == 2:
        require(
            numbers["process_id"] < numbers["num_processes"],
            f"--distributed.process_id={numbers['process_id']}: must be less than "
            f"--distributed.num_processes={numbers['num_processes']}",
        )
    address = flags.get("coordinator_address")
    if address is None:
        return numbers
    host, _, port = address.rpartition(":")
    require(
        bool(host) and port.isdecimal() and 0 < int(port) < 65536,
        f"--distributed.coordinator_address={address}: must be HOST:PORT, of process 0",
    )
    return numbers | {"coordinator_address": address}


def _in_cluster() -> bool:
    """Whether JAX would find out by itself which process this is."""
    return "JAX_COORDINATOR_ADDRESS" in os.environ or any(
        cluster.is_env_present()
        for cluster in ClusterEnv._cluster_types
        if not cluster.opt_in_only_method
    )


def _check_port(given: dict[str, Any]) -> None:
    """The service crashes where the port is taken."""
    if given.get("process_id") != 0 or "coordinator_address" not in given:
        return
    address, dual = given["coordinator_address"], socket.has_dualstack_ipv6()
    everywhere = ("", int(address.rpartition(":")[2]))
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(everywhere, family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise UserError(
            f"--distributed.coordinator_address={address}: the port cannot be used "
            f"({error.strerror}): choose another, the same for all processes"
        ) from error


def _watch() -> None:
    """Ends this process when another has failed."""
    while not _finished.wait(_LOOK_SECONDS):
        line = ""
        try:
            failures = _client().key_value_dir_get(_FAILURE)
        except jax.errors.JaxRuntimeError:  # the coordinator is gone, without a word
            failures, line = [("", str(PEER_LOST))], _LOST
        if failures and not _finished.is_set():
            _ending.acquire()
            _leave(int(failures[0][1].split()[0]), line)


def _say(line: str) -> None:
    """Prints a line on stderr, where nobody may be reading."""
    if line:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _leave(code: int, line: str) -> NoReturn:
    """Ends this process at once, whatever its threads wait for; the coordinator goes last."""
    _say(line)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    client, here = _client(), jax_distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_LEFT}/{here.process_id}", "")
        deadline = time.monotonic() + (_LEAVE_SECONDS if here.process_id == 0 else 0.0)
        while time.monotonic() < deadline:
            if len(client.key_value_dir_get(_LEFT)) == here.num_processes:
                break
            time.sleep(0.1)
    os._exit(code)


def _end_after_traceback(kind, error, traceback) -> None:
    sys.__excepthook__(kind, error, traceback)
    os._exit(end(1, "error: a process of this run failed, for the reason above"))


_handler: Any = None  # a reference, for as long as the system may call it


def _on_abort(line: str) -> None:
    """Has this process end with a line where JAX's coordination client aborts it.

    That is what the client does when a process is lost, and nothing in Python comes before it: a
    handler of `signal` would run too late, after `abort`.
    """
    global _handler

    def leave(number: int) -> None:
        os.write(2, f"\n{line}\n".encode())
        os._exit(PEER_LOST)

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(leave)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)
