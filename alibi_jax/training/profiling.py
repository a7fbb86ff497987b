"""A trace of some training steps, for TensorBoard's profiler or xprof."""

from pathlib import Path

import jax

from alibi_jax.errors import require
from alibi_jax.training.state import TrainState

DIRECTORY = "profile"
NEVER = range(0)


def parse_steps(text: str, num_steps: int) -> range:
    """The steps that `--profile=START:STOP` names; raises UserError unless all of them are taken.

    As a slice: they are the STOP - START steps after the first START.
    """
    start, _, stop = text.partition(":")
    numbers = start.isdecimal() and stop.isdecimal()
    require(
        numbers and int(start) < int(stop) <= num_steps,
        f"--profile={text}: must be START:STOP, whole numbers with 0 <= START < STOP <= "
        f"{num_steps}, which is config.training.num_steps",
    )
    return range(int(start), int(stop))


class Profiler:
    """Traces the steps of a range, in the first process only."""

    def __init__(self, directory: Path, steps: range):
        """The trace goes below `directory`, which is made for it."""
        self._directory = directory
        self._steps = steps if jax.process_index() == 0 else NEVER
        self._tracing = False

    def at(self, step: int, state: TrainState) -> None:
        """Starts or ends the trace, if that is due when `step` steps led to `state`."""
        if (step in self._steps) == self._tracing:
            return
        jax.block_until_ready(state)  # so that the trace holds whole steps
        if self._tracing:
            self.close()
        else:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def close(self) -> None:
        """Ends and writes a trace that is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
