"""Where the wall time of a run goes: one clock, always on exactly one activity."""

import array
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alibi_jax.files import write_text

FILE = "goodput.json"
# "input" is time that the loop waited for a batch. The device may have been busy with the step
# before, so it bounds from above what input costs. "other" is all that has no name.
ACTIVITIES = ("steps", "input", "checkpoint", "validation", "compile", "evaluation", "other")


class Clock:
    """Splits time by activity; what is spent inside an activity on another counts for that one.

    It reads the host's clock alone and never waits for a device.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        """Starts on "other"; `now` gives seconds."""
        self._now = now
        self._activity, self._since = "other", now()
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._earlier, self._sessions = dict(self._seconds), 1
        self._laps = array.array("d")
        self._lap_start = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this session by activity; their sum is its age."""
        self._switch(self._activity)
        return dict(self._seconds)

    @contextlib.contextmanager
    def spend(self, activity: str) -> Iterator[None]:
        """The time inside is spent on `activity`, one of `ACTIVITIES`."""
        before = self._activity
        self._switch(activity)
        try:
            yield
        finally:
            self._switch(before)

    def lap(self) -> float:
        """Ends a step; returns its seconds: those on "steps" and "input" since the one before."""
        self._switch(self._activity)
        end = self._seconds["steps"] + self._seconds["input"]
        self._laps.append(end - self._lap_start)
        self._lap_start = end
        return self._laps[-1]

    def resume(self, workdir: Path) -> None:
        """Adds what earlier sessions wrote in `workdir`; a file that is not whole counts as none.

        A session that was killed wrote its last when it last saved.
        """
        try:
            record = json.loads((workdir / FILE).read_text(encoding="utf-8"))
            earlier = {name: float(record["seconds"][name]) for name in ACTIVITIES}
            self._sessions = int(record["sessions"]) + 1
        except (OSError, ValueError, TypeError, KeyError):
            return
        self._earlier = earlier

    def record(self) -> dict[str, Any]:
        """What `write` writes.

        Returns:
          "sessions", how many processes the run took so far; "seconds" by activity, over all of
          them; "goodput", the share of steps in these; "step_seconds" of this session: "p50",
          "p90", "p99" and "max", or {} before the first step.
        """
        seconds = {name: self._earlier[name] + spent for name, spent in self.seconds.items()}
        return {
            "sessions": self._sessions,
            "seconds": seconds,
            "goodput": seconds["steps"] / max(sum(seconds.values()), 1e-9),
            "step_seconds": percentiles(self._laps),
        }

    def write(self, workdir: Path) -> dict[str, Any]:
        """Writes `record` into `workdir`, in the first process only, and returns it."""
        record = self.record()
        if jax.process_index() == 0:
            write_text(workdir / FILE, json.dumps(record, indent=2) + "\n")
        return record

    def _switch(self, activity: str) -> None:
        now = self._now()
        self._seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now


def percentiles(step_seconds: array.array) -> dict[str, float]:
    """{"p50", "p90", "p99", "max"} of some steps' seconds; {} of none."""
    if not step_seconds:
        return {}
    values = np.percentile(step_seconds, (50, 90, 99, 100))
    return dict(zip(("p50", "p90", "p99", "max"), map(float, values), strict=True))


def table(record: Mapping[str, Any]) -> str:
    """A few lines for a person, of what `Clock.record` returns."""
    seconds = record["seconds"]
    total = max(sum(seconds.values()), 1e-9)
    sessions = f" in {record['sessions']} sessions" if record["sessions"] > 1 else ""
    lines = [f"wall time {total:,.1f} s{sessions}, {record['goodput']:.1%} of it in steps"]
    lines += [
        f"{name:>11} {spent:>12,.1f} s {spent / total:>7.1%}" for name, spent in seconds.items()
    ]
    if record["step_seconds"]:
        times = ", ".join(f"{name} {1e3 * t:,.1f} ms" for name, t in record["step_seconds"].items())
        lines.append(f"a step: {times}")
    return "\n".join(lines)
