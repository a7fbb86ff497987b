"""Time and peak memory of attention against length, beside peers, forward and backward.

    python benchmarks/attention.py              # CPU: results/attention_cpu{,_bfloat16}.{json,png}
    python benchmarks/attention.py --gpu        # on a GPU: results/attention_gpu.{json,png}

Each (method, length, dtype) runs in a process of its own, compiled and warmed up, each in the
layout that it likes best; all methods at one length run one after the other. The peers in PyTorch
need `pip install torch==2.13.0` beside this package, and are left out without it.

On a CPU: one sequence, 8 heads of 64, random normal inputs. Times are the median of up to 7 runs.
Peak memory is the growth of the process's resident set over what inputs and compiled code take;
it includes the outputs. On a GPU: 16k tokens in all, heads of 64 and 128, 2048 wide, and the most
memory that the device held, inputs included.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import alibi_jax
from benchmarks.common import RESULTS, write

# The longest length that each method is given, forward and backward: what fits into 24 GiB, or
# into a quarter of an hour.
CPU_METHODS = {
    "alibi_jax": 131072,
    "alibi_jax dense": 4096,
    "jax.nn with bias": 4096,
    "jax.nn without bias": 4096,
    "torch SDPA with bias": 8192,
    "torch FlexAttention": 16384,
    "torch SDPA without bias": 32768,
}
GPU_METHODS = {
    "alibi_jax": 65536,
    "alibi_jax dense": 4096,
    "cudnn without bias": 65536,
    "cudnn with bias": 16384,
    "torch FlexAttention": 65536,
}
SECONDS = 3.0  # of repetitions, after the first


def slopes(heads: int) -> np.ndarray:
    return np.asarray(alibi_jax.slopes(heads))


def jax_method(name: str, m: np.ndarray, length: int, dtype: Any) -> Any:
    """Returns attention(query, key, value), [B, T, H, D], and the extra arrays it takes."""
    if name == "alibi_jax":
        return functools.partial(alibi_jax.attention, slopes=jnp.asarray(m)), ()
    if name == "alibi_jax dense":
        dense = functools.partial(alibi_jax.attention, implementation="dense")
        return functools.partial(dense, slopes=jnp.asarray(m)), ()
    implementation = "cudnn" if name.startswith("cudnn") else "xla"
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )
    if name.endswith("without bias"):
        return attend, ()
    positions = jnp.arange(length)
    bias = alibi_jax.bias(jnp.asarray(m), positions, positions, kind="symmetric")[None]
    return lambda q, k, v, bias: attend(q, k, v, bias), (bias.astype(dtype),)


def jax_calls(case: dict[str, Any]) -> tuple[Any, Any]:
    dtype = jnp.dtype(case["dtype"])
    shape = (case["batch"], case["length"], case["heads"], case["head_dim"])
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    attend, extra = jax_method(case["method"], slopes(case["heads"]), case["length"], dtype)

    def pull(q, k, v, dout, *extra):
        _, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, *extra), q, k, v)
        return pullback(dout)

    forward, both = jax.jit(attend), jax.jit(pull)
    return (
        lambda: jax.block_until_ready(forward(q, k, v, *extra)),
        lambda: jax.block_until_ready(both(q, k, v, dout, *extra)),
    )


def torch_calls(case: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, dtype = case["length"], getattr(torch, case["dtype"])
    shape = (case["batch"], case["heads"], length, case["head_dim"])
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        torch.tensor(rng.normal(size=shape), dtype=dtype, device=device) for _ in range(4)
    )
    m = torch.tensor(slopes(case["heads"]), device=device)
    if case["method"] == "torch SDPA without bias":
        attend = functools.partial(sdpa, is_causal=True)
    elif case["method"] == "torch SDPA with bias":
        at = torch.arange(length)
        distance = (at[:, None] - at[None, :]).float()
        bias = (-m[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)[None].to(dtype)
        attend = functools.partial(sdpa, attn_mask=bias)
    else:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, length, length, device=device
        )
        attend = functools.partial(
            torch.compile(flex_attention),
            score_mod=lambda score, b, h, i, j: score + (j - i) * m[h],
            block_mask=mask,
        )

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad():
            attend(q, k, v)
        wait()

    def both():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*inputs).backward(dout)
        wait()

    # PyTorch 2.13 has no backward pass of FlexAttention on a CPU.
    no_backward = case["method"] == "torch FlexAttention" and device == "cpu"
    return forward, None if no_backward else both


def status(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def device_peak(reset: bool = False) -> int | None:
    """Returns the most bytes a GPU held so far, or None on a CPU; PyTorch's count can be reset."""
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measure(call: Any) -> dict[str, Any]:
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    device_peak(reset=True)
    seconds: list[float] = []
    while len(seconds) < 7 and sum(seconds) < SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "first_call_seconds": first,
        "peak_bytes": status("VmHWM") - before,
        "device_peak_bytes": device_peak(),
    }


def worker(case: dict[str, Any]) -> None:
    calls = (torch_calls if case["method"].startswith("torch") else jax_calls)(case)
    row = {}
    for name, call in zip(("forward", "forward_backward"), calls, strict=True):
        row[name] = None if call is None else measure(call)
    print(json.dumps(row))


def run(case: dict[str, Any]) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "benchmarks.attention", "--worker", json.dumps(case)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if process.returncode != 0:
        print(f"failed: {case}\n{process.stderr[-2000:]}")
        return None
    row = case | json.loads(process.stdout.splitlines()[-1])
    times = (row[name] and f"{1000 * row[name]['seconds']:.1f}" for name in NAMES)
    print(f"{case['length']:>7} {case['dtype']:<9} {case['method']:<24}", *times, "ms", flush=True)
    return row


NAMES = ("forward", "forward_backward")


def error(length: int) -> dict[str, Any]:
    """Root mean square error against float64 of 64 rows, ours and of dense float32."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, length, 8, 64)).astype(np.float32) for _ in range(3))
    m = slopes(8)
    rows = np.sort(rng.choice(length, min(length, 64), replace=False))
    exact = np.empty((len(rows), 8, 64))
    for h in range(8):
        distance = rows[:, None] - np.arange(length)
        logits = np.float64(q[0, rows, h]) @ np.float64(k[0, :, h]).T / 8
        logits = np.where(distance < 0, -np.inf, logits - m[h] * distance)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        exact[:, h] = weights @ np.float64(v[0, :, h]) / weights.sum(axis=1, keepdims=True)
    ours = jax.jit(alibi_jax.attention)(q, k, v, m)[0, rows]
    dense = alibi_jax.attention(
        q[:, rows],
        k,
        v,
        m,
        query_positions=rows,
        key_positions=np.arange(length),
        implementation="dense",
    )[0]
    ours, dense = (float(np.sqrt(np.mean((np.float64(x) - exact) ** 2))) for x in (ours, dense))
    return {"length": length, "alibi_jax": ours, "dense": dense, "ratio": ours / dense}


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times longer each peer takes than ours, at the same setting and in the same run."""
    setting = ("length", "dtype", "head_dim")
    ours = {tuple(row[s] for s in setting): row for row in rows if row["method"] == "alibi_jax"}
    return [
        {s: row[s] for s in setting}
        | {"method": row["method"]}
        | {
            name: row[name]["seconds"] / ours[tuple(row[s] for s in setting)][name]["seconds"]
            for name in NAMES
            if row[name]
        }
        for row in rows
        if row["method"] != "alibi_jax" and tuple(row[s] for s in setting) in ours
    ]


def peak_flops(dtype: str) -> float:
    """What a large matrix product reaches on this machine, in FLOP/s."""
    x = jnp.ones((4096, 4096), dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    start = time.perf_counter()
    multiply(x).block_until_ready()
    return 2 * 4096**3 / (time.perf_counter() - start)


def figure(rows: list[dict[str, Any]], flops: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    first = rows[0]
    lengths = sorted({row["length"] for row in rows})
    batch = {row["length"]: row["batch"] for row in rows}
    per_pair = 4 * first["heads"] * first["head_dim"]
    for axis, name, factor in zip(axes, NAMES, (1.0, 3.5), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [r for r in rows if r["method"] == method and r[name]]
            own = method == "alibi_jax"
            axis.plot(
                [r["length"] for r in points],
                [r[name]["seconds"] for r in points],
                "o-" if own else ".-",
                label=method,
                linewidth=3 if own else 1.2,
                zorder=3 if own else 2,
            )
        floor = [factor * per_pair * batch[n] * n**2 / 2 / flops for n in lengths]
        axis.plot(lengths, floor, "k:", label="all causal pairs at the speed of a matrix product")
        axis.set(
            xscale="log", yscale="log", xlabel="length (tokens)", title=name.replace("_", " + ")
        )
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the methods and sizes for a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="powers of two, by default all")
    parser.add_argument("--dtypes", nargs="+", help="by default float32 and bfloat16")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)

    methods = GPU_METHODS if options.gpu else CPU_METHODS
    if importlib.util.find_spec("torch") is None:
        methods = {name: most for name, most in methods.items() if "torch" not in name}
        print("torch is not installed: its peers are left out")
    most = max(methods.values())
    lengths = options.lengths or [2**n for n in range(9, 18) if 2**n <= most]
    dtypes = options.dtypes or (("bfloat16",) if options.gpu else ("float32", "bfloat16"))
    head_dims = (64, 128) if options.gpu else (64,)
    for dtype in dtypes:
        compare(options.gpu, dtype, head_dims, lengths, methods)


def compare(
    gpu: bool, dtype: str, head_dims: Sequence[int], lengths: list[int], methods: dict[str, int]
) -> None:
    """Runs and writes all cases of one dtype."""
    rows = []
    for head_dim, length in itertools.product(head_dims, lengths):
        heads, batch = (2048 // head_dim, max(1, 16384 // length)) if gpu else (8, 1)
        for method, longest in methods.items():
            if length <= longest:
                case = {"method": method, "length": length, "dtype": dtype, "batch": batch}
                rows.append(run(case | {"heads": heads, "head_dim": head_dim}))
    rows = [row for row in rows if row]
    name = "attention_gpu" if gpu else "attention_cpu"
    name += "" if gpu or dtype == "float32" else f"_{dtype}"
    numbers: dict[str, Any] = {"rows": rows, "ratios": ratios(rows)}
    if gpu:
        for row in rows:
            pairs = row["batch"] * row["heads"] * row["length"] ** 2 / 2
            for part, products in zip(NAMES, (2, 7), strict=True):
                if row[part]:
                    work = products * 2 * pairs * row["head_dim"]
                    row[part]["tflops"] = work / row[part]["seconds"] / 1e12
    elif dtype == "float32":
        numbers["error"] = [error(n) for n in lengths if n <= 65536]
    numbers["matrix_product_flops"] = peak_flops(dtype)
    write(name, numbers)
    shown = [row for row in rows if row["head_dim"] == head_dims[-1]]
    figure(shown, numbers["matrix_product_flops"], RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
