"""The clock: at every moment on one activity, so that the parts are the whole."""

import json

import numpy as np
import pytest

from alibi_jax.training import goodput


class Time:
    """A host's clock that moves when told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        """Its seconds."""
        return self.seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return goodput.Clock(now=time)


def spend(time, clock, **seconds):
    for activity, duration in seconds.items():
        with clock.spend(activity):
            time.seconds += duration


def test_parts_are_the_whole(time, clock):
    time.seconds += 1.0
    with clock.spend("steps"):
        time.seconds += 2.0
        with clock.spend("input"):
            time.seconds += 4.0
            assert clock.seconds["input"] == 4.0  # of what is under way, too
        time.seconds += 8.0
        with pytest.raises(KeyError), clock.spend("validation"):
            time.seconds += 16.0
            raise KeyError
        time.seconds += 32.0
    time.seconds += 64.0
    spent = {name: seconds for name, seconds in clock.seconds.items() if seconds}
    assert spent == {"other": 65.0, "steps": 42.0, "input": 4.0, "validation": 16.0}
    assert sum(spent.values()) == time.seconds - 100.0


def test_a_lap_is_steps_and_input_alone(time, clock):
    time.seconds += 1.0
    with clock.spend("steps"):
        spend(time, clock, input=2.0)
        time.seconds += 4.0
        assert clock.lap() == 6.0
        spend(time, clock, checkpoint=8.0, validation=16.0)
        time.seconds += 32.0
        assert clock.lap() == 32.0


def test_record(time, clock):
    steps = np.random.default_rng(0).permutation(np.arange(1.0, 102.0))  # 1 .. 101
    with clock.spend("steps"):
        for seconds in steps:
            time.seconds += seconds
            clock.lap()
    time.seconds += steps.sum()
    record = clock.record()
    assert record["sessions"] == 1 and record["goodput"] == 0.5
    assert record["step_seconds"] == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}
    text = goodput.table(record)
    assert "50.0% of it in steps" in text and "p99 100,000.0 ms" in text
    assert all(name in text for name in goodput.ACTIVITIES)


def test_before_the_first_step(time, clock):
    assert clock.record()["goodput"] == 0.0 and clock.record()["step_seconds"] == {}
    assert "wall time 0.0 s" in goodput.table(clock.record())


def test_sessions_add_up(time, clock, tmp_path):
    clock.resume(tmp_path)  # nothing there yet
    spend(time, clock, steps=3.0, compile=1.0)
    clock.write(tmp_path)
    clock.write(tmp_path)  # the same session again: not twice
    for _ in range(2):
        later = goodput.Clock(now=time)
        later.resume(tmp_path)
        spend(time, later, steps=2.0)
        later.write(tmp_path)
    record = json.loads((tmp_path / goodput.FILE).read_text())
    assert record == later.record()
    assert record["sessions"] == 3
    assert record["seconds"]["steps"] == 7.0 and record["seconds"]["compile"] == 1.0
    assert record["goodput"] == 7.0 / 8.0
    assert "in 3 sessions" in goodput.table(record)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"seconds": {}}', '{"seconds": null}'])
def test_a_damaged_file_counts_as_none(time, clock, tmp_path, text):
    (tmp_path / goodput.FILE).write_text(text)
    clock.resume(tmp_path)
    spend(time, clock, steps=1.0)
    clock.write(tmp_path)
    record = json.loads((tmp_path / goodput.FILE).read_text())
    assert record["sessions"] == 1 and record["goodput"] == 1.0
