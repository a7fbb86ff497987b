"""metrics.jsonl and TensorBoard events: complete, and without what a resumed run does again."""

import json
import math
import struct

import numpy as np
import pytest

from alibi_jax.training.goodput import Clock
from alibi_jax.training.logs import Logs
from tests.disks import disk as disk


def metrics(loss=2.0, tokens=100.0, num_bytes=200.0):
    values = {"loss": loss, "grad_norm": 0.5, "learning_rate": 1e-3}
    values |= {"tokens": tokens, "bytes": num_bytes}
    return {name: np.float32(value) for name, value in values.items()}


def open_logs(folder, start=0, num_steps=10, clock=None, peak_seconds=None):
    return Logs(
        folder,
        start=start,
        num_steps=num_steps,
        clock=Clock() if clock is None else clock,
        peak_seconds=peak_seconds,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder, whole=True):
    """Gives {(tag, step): value} as TensorBoard shows them; checks every length and CRC.

    What is not `whole` may end within an event.
    """
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    scalars = {}
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            header = data[at : at + 8]
            (length,) = struct.unpack("<Q", header.ljust(8, b"\0"))
            if not whole and len(data) < at + 16 + length:
                at = len(data)
                break
            (header_crc,) = struct.unpack("<I", data[at + 8 : at + 12])
            body = data[at + 12 : at + 12 + length]
            (body_crc,) = struct.unpack("<I", data[at + 12 + length : at + 16 + length])
            assert (masked(header), masked(body)) == (header_crc, body_crc)
            at += 16 + length
            event = Event.FromString(body)
            if event.HasField("session_log"):  # a restart hides what is at this step or after
                scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
        assert at == len(data)
    return scalars


def test_values(tmp_path):
    logs = open_logs(tmp_path)
    assert logs.train(1, metrics(loss=3.0), write=False) == 3.0
    assert logs.train(2, metrics(loss=2.0), write=True) == 2.0
    logs.validation(2, 50.0, 50.0, 200.0)
    train, validation = lines(tmp_path)  # not closed: a kill loses nothing
    assert train.keys() == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "bits_per_byte",
        "tokens_per_second",
        "step_seconds_p50",
        "step_seconds_p90",
        "step_seconds_p99",
        "step_seconds_max",
    }
    assert (train["step"], train["loss"]) == (2, 2.0)
    assert train["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 2.0)
    assert train["tokens_per_second"] > 0
    assert validation == {
        "step": 2,
        "validation_loss": 1.0,
        "validation_bits_per_byte": pytest.approx(1.0 / math.log(2) / 4.0),
    }
    scalars = events(tmp_path)
    assert {tag for tag, _ in scalars} == {
        *(f"train/{name}" for name in train if name != "step"),
        "validation/validation_loss",
        "validation/validation_bits_per_byte",
    }
    assert scalars["train/loss", 2] == 2.0
    assert scalars["train/bits_per_byte", 2] == pytest.approx(train["bits_per_byte"], rel=1e-6)
    logs.close()


def test_times(tmp_path, capsys):
    """Each interval has its own; validation and checkpoints are in none."""
    now = 0.0
    clock = Clock(now=lambda: now)
    logs = open_logs(tmp_path, clock=clock, peak_seconds=0.5)
    with clock.spend("steps"):
        for step, seconds in enumerate((1.0, 2.0, 3.0, 4.0), 1):
            now += seconds
            logs.train(step, metrics(tokens=100.0), write=step % 2 == 0)
            with clock.spend("validation"):
                now += 100.0
                logs.validation(step, 1.0, 1.0, 1.0)
    logs.close()
    first, second = (line for line in lines(tmp_path) if "loss" in line)
    assert first["tokens_per_second"] == pytest.approx(200.0 / 3.0)
    assert second["tokens_per_second"] == pytest.approx(200.0 / 7.0)
    assert first["mfu"] == pytest.approx(2 * 0.5 / 3.0)
    assert second["mfu"] == pytest.approx(2 * 0.5 / 7.0)
    assert (second["step_seconds_p50"], second["step_seconds_max"]) == (3.5, 4.0)
    assert second["step_seconds_p90"] == pytest.approx(3.9)
    scalars = events(tmp_path)
    assert scalars["train/mfu", 4] == pytest.approx(second["mfu"])
    assert scalars["train/step_seconds_p99", 4] == pytest.approx(3.99)
    assert "MFU 14.3%" in capsys.readouterr().err


def test_skipped_steps_are_kept_and_counted_over_sessions(tmp_path, capsys):
    def train(logs, step, skipped):
        values = metrics(loss=math.nan if skipped else 2.0) | {"skipped": np.float32(skipped)}
        logs.train(step, values, write=step % 5 == 0)

    logs = open_logs(tmp_path)
    for step in range(1, 8):
        train(logs, step, skipped=step in (2, 4, 7))
    logs.close()
    assert "3 skipped" in capsys.readouterr().err
    logs = open_logs(tmp_path, start=6)  # the last is done again
    for step in range(7, 11):
        train(logs, step, skipped=step == 8)
    logs.close()
    kept = [(line["step"], line["skipped"], line["loss"]) for line in lines(tmp_path)]
    assert kept == [(2, 1, None), (4, 2, None), (5, 2, 2.0), (8, 3, None), (10, 3, 2.0)]


def test_resuming_drops_what_comes_again(tmp_path):
    logs = open_logs(tmp_path)
    for step in range(1, 6):
        logs.train(step, metrics(loss=step), write=True)
    logs.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed as it wrote this line
    logs = open_logs(tmp_path, start=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    for step in (4, 5):
        logs.train(step, metrics(loss=10 * step), write=True)
    logs.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
        (5, 50),
    ]
    scalars = events(tmp_path)
    losses = {step: value for (tag, step), value in scalars.items() if tag == "train/loss"}
    assert losses == {1: 1, 2: 2, 3: 3, 4: 40, 5: 50}


def test_full_disk(disk):
    """A real one: what does not fit raises where it is written, and what did is still there."""
    disk.mount("size=64k")
    logs, written = open_logs(disk.path, num_steps=10_000), 0
    with pytest.raises(OSError, match="No space left"):
        for step in range(1, 10_000):
            logs.train(step, metrics(loss=step), write=True)
            written = step
    logs.close()
    assert written > 10
    disk.mount("remount,size=1m")
    (path,) = (disk.path / "tensorboard").iterdir()
    assert events(disk.path, whole=False)["train/loss", written] == written
    path.unlink()
    logs = open_logs(disk.path, start=written)
    assert [line["loss"] for line in lines(disk.path)] == list(range(1, written + 1))
    logs.train(written + 1, metrics(), write=True)
    logs.close()
    assert lines(disk.path)[-1]["step"] == written + 1
    assert events(disk.path)["train/loss", written + 1] == 2.0


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    logs = open_logs(tmp_path, start=1)
    logs.train(2, metrics(), write=True)
    logs.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_lines_that_are_not_ours(tmp_path):
    text = b'3\n[]\n{}\n\xff\n{"step": "a"}\n{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text)
    open_logs(tmp_path, start=5).close()
    assert lines(tmp_path) == [{"step": 1}]


def test_metrics_are_strict_json(tmp_path):
    logs = open_logs(tmp_path)
    assert math.isnan(logs.train(1, metrics(loss=math.nan), write=True))
    logs.validation(1, math.inf, 1.0, 1.0)
    logs.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [line.get("loss", line.get("validation_loss")) for line in lines(tmp_path)] == [None] * 2


def test_the_bar_starts_where_the_run_does(tmp_path, capsys):
    logs = open_logs(tmp_path, start=4)
    logs.train(5, metrics(), write=True)
    logs.note("a note")
    logs.close()
    output = capsys.readouterr()
    assert "5/10" in output.err and "bits/byte" in output.err
    assert "a note" in output.out
