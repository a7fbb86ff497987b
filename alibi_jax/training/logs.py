"""What a run reports while it trains: a progress bar, metrics.jsonl and TensorBoard events."""

import json
import math
import time
from pathlib import Path
from typing import TextIO

import tqdm

from alibi_jax.distributed import is_main
from alibi_jax.files import write_text
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
        bytes_per_token: float,
        validation_bytes_per_token: float,
    ):
        """Continues the logs of `workdir` after step `start`; later entries are dropped."""
        import tensorboardX

        writes = is_main()
        self._file = _truncated(workdir / self.METRICS, start) if writes else None
        # The suffix: two files of one second would have one name.
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=start + 1,
            filename_suffix=f".{start}",
            write_to_disk=writes,
        )
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=start,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not writes,
        )
        self._train_bits = 1.0 / (math.log(2.0) * bytes_per_token)  # per byte, of a nat per token
        self._validation_bits = 1.0 / (math.log(2.0) * validation_bytes_per_token)
        self._since, self._tokens = time.perf_counter(), 0.0

    def train(self, step: int, metrics: Metrics, *, write: bool) -> float:
        """Shows the metrics of a step, and keeps them if `write`. Returns its loss."""
        values = {name: float(value) for name, value in metrics.items()}
        self._tokens += values.pop("tokens")
        bits = values["loss"] * self._train_bits
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {bits:.3f} bits/byte, {self._rate():,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update()
        if write:
            self._write(
                step, values | {"bits_per_byte": bits, "tokens_per_second": self._rate()}, "train"
            )
            self._since, self._tokens = time.perf_counter(), 0.0
        return values["loss"]

    def validation(self, step: int, loss: float) -> None:
        """Keeps a loss on validation data, in nats per token."""
        bits = loss * self._validation_bits
        self._write(step, {"validation_loss": loss, "validation_bits_per_byte": bits}, "validation")
        self.note(f"step {step}: validation loss {loss:.4f} ({bits:.4f} bits/byte)")
        self._since, self._tokens = time.perf_counter(), 0.0

    def note(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        """Ends the bar and closes the files."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        self._board.close()

    def _rate(self) -> float:
        return self._tokens / max(time.perf_counter() - self._since, 1e-9)

    def _write(self, step: int, values: dict[str, float], group: str) -> None:
        if self._file is None:
            return
        # JSON has no nan and no infinity; they become null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)


def _truncated(path: Path, last_step: int) -> TextIO:
    """The file, open for appending, without entries after `last_step` and without a torn line."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):  # torn: the process was killed as it wrote it
            continue
    write_text(path, "".join(kept))
    return path.open("a")
