"""The paper's 1.3B model on TPU slices, compiled here: memory, work, and the least time of a step.

  python -m benchmarks.plan            compiles every row (minutes each) and writes the JSON
  python -m benchmarks.plan --table    prints the table from it

ALiBi at L=1024 beside its counterpart, sinusoidal at L=2048, both at 2^21 tokens a step, on the
same slice with the same mesh. Writes results/plan_1p3b.json after each row and keeps the rows that
it holds, so that it can be stopped.
"""

import json
import sys
from typing import Any

from alibi_jax.config import load_config
from alibi_jax.plan import plan
from alibi_jax.training.chips import parse_topology
from benchmarks.common import RESULTS, write

CONFIG = "configs/paper_1p3b.py"
VARIANTS = ("alibi1024", "sinusoidal2048")
# Slices, and the parts of the mesh over which parameters are sharded.
SLICES = {
    "v5e:16x16": {"mesh.data": "16", "mesh.fsdp": "16"},
    "v5p:4x4x4": {"mesh.data": "4", "mesh.fsdp": "16"},
}


def row(variant: str, topology: str, overrides: dict[str, str]) -> dict[str, Any]:
    config = load_config(f"{CONFIG}:{variant}", overrides)
    found = plan(config, parse_topology(topology), lambda text: print(text, flush=True))
    return {"variant": variant} | found.to_dict()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| slice | model | memory a device | GFLOPs a token | floor of a step | bound by "
        "| tokens/s at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        memory = r["step"]["memory"]
        lines.append(
            f"| {r['topology']} | {r['variant']} "
            f"| {memory['total'] / 2**30:.2f} of {memory['usable'] / 2**30:.2f} GiB "
            f"| {r['model_flops_per_token'] / 1e9:.2f} "
            f"| {r['floor_seconds']:.3f} s | {r['bound']} "
            f"| {r['tokens_per_second'] / 1e6:.2f}M |"
        )
    return "\n".join(lines)


def main() -> None:
    path = RESULTS / "plan_1p3b.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    if "--table" not in sys.argv:
        done = {(r["topology"], r["variant"]) for r in rows}
        for topology, overrides in SLICES.items():
            for variant in VARIANTS:
                if (topology, variant) not in done:
                    print(f"{variant} on {topology}", flush=True)
                    rows.append(row(variant, topology, overrides))
                    write("plan_1p3b", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
