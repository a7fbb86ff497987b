"""Seven position methods on whole books, and a model of ALiBi at a thousand times its length.

  python benchmarks/books.py 'files:DIR/{split}.jsonl.xz' WORKDIR

Runs configs/compare_books.py on books that are split by author, and evaluates ALiBi's first run on
windows of 131072 bytes. Goes on in WORKDIR where it was stopped. Writes to results/ what the
commands left: books_comparison.{json,md,png}, and books_128k.{json,png} with the seconds that the
evaluation took and the memory of its process at most.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = ("alibi", "sinusoidal", "rotary", "t5", "kerple_log", "none", "forgetting")
PROTOCOLS = ("nonoverlapping", "fixed_targets", "by_position", "truncated_input")

source, workdir = sys.argv[1], Path(sys.argv[2])


def alibi(*arguments: str) -> dict[str, float]:
    """Runs the command `alibi`; gives what it took."""
    command, start = [sys.executable, "-m", "alibi_jax", *arguments], time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "command_seconds": round(time.perf_counter() - start, 1),
        "peak_gigabytes": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def publish(path: Path, name: str, **more: float) -> None:
    """Copies numbers and figure to the results, without where the books were."""
    record = json.loads(path.read_text()) | more
    record["config"]["data"] |= {"source": "files:books/{split}.jsonl.xz", "cache_dir": None}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy(path.with_suffix(".png"), RESULTS / f"{name}.png")


alibi(
    "compare",
    "--config=configs/compare_books.py",
    f"--config.data.source={source}",
    f"--workdir={workdir}",
    f"--methods={','.join(METHODS)}",
    "--seeds=3",
    f"--protocols={','.join(PROTOCOLS)}",
)
publish(workdir / "comparison.json", "books_comparison")
shutil.copy(workdir / "comparison.md", RESULTS / "books_comparison.md")

far = workdir / "alibi-128k"
shutil.rmtree(far, ignore_errors=True)  # measured anew; the numbers of the comparison stay
shutil.copytree(workdir / "alibi" / "seed-0", far, ignore=shutil.ignore_patterns("evaluation*"))
spent = alibi(
    "eval",
    f"--workdir={far}",
    "--lengths=128,4096,131072",
    "--config.evaluation.num_windows=4",
    f"--protocols={','.join(PROTOCOLS)}",
)
publish(far / "evaluation.json", "books_128k", **spent)
