"""What a run reports while it trains: a progress bar, metrics.jsonl and TensorBoard events."""

import array
import json
import math
from pathlib import Path
from typing import Any

import tqdm

from alibi_jax.distributed import is_main
from alibi_jax.files import write_text
from alibi_jax.training import events
from alibi_jax.training.goodput import Clock, percentiles
from alibi_jax.training.step import Metrics


class Logs:
    """Reports metrics at their steps; nothing here touches the device until a step is done.

    Of several processes only process 0 shows and writes anything.

    Attributes:
      METRICS: name of the file that holds one JSON object a line.
    """

    METRICS = "metrics.jsonl"

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        num_steps: int,
        clock: Clock,
        peak_seconds: float | None = None,
        bar: tqdm.tqdm | None = None,
    ):
        """Continues the logs of `workdir` after step `start`; later entries are dropped.

        `clock` gives the time of steps. `peak_seconds` is what one takes at the peak of the
        devices, for MFU; None: not known, and MFU is left out. `bar` counts the steps of several
        runs and stays open; None: a bar of this run's own.
        """
        writes = is_main()
        self._file, self._events = workdir / self.METRICS, Path()
        kept: list[dict[str, Any]] = []
        if writes:
            kept = _truncate(self._file, start)
            self._events = events.begin(workdir / "tensorboard", start)
        self._owns_bar = bar is None
        if bar is None:
            bar = tqdm.tqdm(
                total=num_steps,
                initial=start,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                disable=not writes,
            )
        else:  # steps of earlier sessions took no time now
            bar.n, bar.initial = bar.n + start, bar.initial + start
        self._bar = bar
        self._clock, self._peak_seconds = clock, peak_seconds
        self._skipped = next((x["skipped"] for x in reversed(kept) if "skipped" in x), 0)
        self._begin_interval()

    def train(self, step: int, metrics: Metrics, *, write: bool) -> float:
        """Shows the metrics of a step, once it is done; keeps them if `write`. Returns its loss.

        What is kept covers the interval since the last that was, in its times; "skipped" counts
        from the start of the run, and a skipped step is always kept.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._step_seconds.append(self._clock.lap())
        self._seconds += self._step_seconds[-1]
        tokens = values.pop("tokens")
        self._tokens += tokens
        bits = _bits_per_byte(values["loss"] * tokens, values.pop("bytes"))
        rates = {"tokens_per_second": self._tokens / max(self._seconds, 1e-9)}
        shown = f"loss {values['loss']:.3f}, {bits:.3f} bits/byte"
        shown += f", {rates['tokens_per_second']:,.0f} tokens/s"
        if self._peak_seconds is not None:
            steps = len(self._step_seconds)
            rates["mfu"] = steps * self._peak_seconds / max(self._seconds, 1e-9)
            shown += f", MFU {rates['mfu']:.1%}"
        if "skipped" in values:
            write = write or values["skipped"] > 0
            values["skipped"] = self._skipped = self._skipped + int(values["skipped"])
            shown += f", {self._skipped} skipped" if self._skipped else ""
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if write:
            times = percentiles(self._step_seconds)
            times = {f"step_seconds_{name}": seconds for name, seconds in times.items()}
            self._write(step, values | {"bits_per_byte": bits} | rates | times, "train")
            self._begin_interval()
        return values["loss"]

    def validation(self, step: int, nats: float, tokens: float, num_bytes: float) -> float:
        """Keeps the loss of validation data: in all, of so many tokens and bytes of text.

        Returns:
          Nats per token.
        """
        loss, bits = nats / max(tokens, 1.0), _bits_per_byte(nats, num_bytes)
        self._write(step, {"validation_loss": loss, "validation_bits_per_byte": bits}, "validation")
        self.note(f"step {step}: validation loss {loss:.4f} ({bits:.4f} bits/byte)")
        return loss

    def note(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        """Ends a bar of its own."""
        if self._owns_bar:
            self._bar.close()

    def _begin_interval(self) -> None:
        self._step_seconds, self._seconds, self._tokens = array.array("d"), 0.0, 0.0

    def _write(self, step: int, values: dict[str, float], group: str) -> None:
        if not is_main():
            return
        # JSON has no nan and no infinity; they become null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        scalars = {f"{group}/{name}": value for name, value in values.items()}
        events.append(self._events, step, scalars)


def _bits_per_byte(nats: float, num_bytes: float) -> float:
    """Of the source text's own bytes; nan where targets have none."""
    return nats / (math.log(2.0) * num_bytes) if num_bytes else math.nan


def _truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Leaves the entries up to `last_step` alone in the file, and gives them."""
    entries, lines = [], []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= last_step:
                entries.append(entry)
                lines.append(line + "\n")
        except (ValueError, TypeError, KeyError):  # torn: the process was killed as it wrote it
            continue
    write_text(path, "".join(lines))
    return entries
