"""The quickstart with each of two position methods: the figure and the table of the README.

  python benchmarks/quickstart.py

Writes results/quickstart_METHOD.json, what the run left in extrapolation.json with the seconds that
the command took, and results/quickstart_METHOD.png; and of ALiBi's run what `alibi eval` writes, as
results/quickstart_evaluation.{json,png}.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

for method in ("alibi", "sinusoidal"):
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                "train.py",
                "--config=configs/quickstart.py",
                f"--workdir={workdir}",
                f"--config.model.position={method}",
            ],
            cwd=ROOT,
            check=True,
        )
        seconds = time.perf_counter() - start
        summary = json.loads((Path(workdir) / "extrapolation.json").read_text())
        record = summary | {"command_seconds": round(seconds, 1)}
        (RESULTS / f"quickstart_{method}.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.copy(Path(workdir) / "extrapolation.png", RESULTS / f"quickstart_{method}.png")
        if method == "alibi":
            command = [sys.executable, "-m", "alibi_jax", "eval", f"--workdir={workdir}"]
            subprocess.run(command, cwd=ROOT, check=True)
            for suffix in ("json", "png"):
                shutil.copy(
                    Path(workdir) / f"evaluation.{suffix}",
                    RESULTS / f"quickstart_evaluation.{suffix}",
                )
