"""TensorBoard's event files, written at once: a full disk raises, and a kill loses nothing.

The messages and the checksum are tensorboardX's. Its writer is not used: it hands events to a
thread, where a full disk is an error that nobody sees.
"""

import socket
import struct
import time
from pathlib import Path
from typing import Any


def begin(directory: Path, start: int) -> Path:
    """Makes a file for what comes after step `start`; TensorBoard hides what was there of that."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    directory.mkdir(parents=True, exist_ok=True)
    # The suffix: two files of one second would have one name.
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{start}"
    begun = SessionLog(status=SessionLog.SessionStatus.START)
    events = [
        Event(wall_time=time.time(), file_version="brain.Event:2"),
        Event(wall_time=time.time(), step=start + 1, session_log=begun),
    ]
    (directory / name).write_bytes(b"".join(map(_record, events)))
    return directory / name


def append(path: Path, step: int, scalars: dict[str, float]) -> None:
    """Appends the values of a step, by their tags."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
    with path.open("ab") as file:
        file.write(_record(event))


def _record(event: Any) -> bytes:
    """A record of the TFRecord format."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    parts = (struct.pack("<Q", len(data)), data)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
