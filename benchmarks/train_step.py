"""What a training step costs: with ALiBi and without, and beside the same model in PyTorch.

    python -m benchmarks.train_step          # CPU: results/train_step.json
    python -m benchmarks.train_step --gpu    # on a GPU: results/train_step_gpu.json

On a CPU: a decoder of 10.7M parameters on bytes (6 layers, 384 wide, 6 heads, float32), 4096 tokens
a step. What is compared takes turns, step by step, in one process, each time with pages of 4 KiB
and of 2 MiB for large arrays (GLIBC_TUNABLES, below). The PyTorch side needs `pip install
torch==2.13.0` and a C++ compiler, and is left out without. It is the same training step: it starts
from our parameters, and its losses must be ours, to 1e-4, for all of the first steps.

On a GPU: the paper's 1.3B model in bfloat16, ALiBi at 1024 tokens and sinusoidal at 2048 with as
many tokens a step, each in a process of its own.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import alibi_jax
from alibi_jax.config import Config, OptimizerConfig, load_config
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import make_mesh
from alibi_jax.training.chips import peak_flops
from alibi_jax.training.flops import flops_per_token
from alibi_jax.training.loop import Program, compile_program
from benchmarks.common import write

MODEL = DecoderConfig(
    vocab_size=257, num_layers=6, embed_dim=384, num_heads=6, scan_layers=False
)  # few layers run faster unrolled
PAPER = load_config(str(Path(__file__).parents[1] / "configs/paper_1p3b.py"), {}).model
TOKENS = 4096  # a step, on a CPU
PAPER_TOKENS = 16384
LENGTHS = 512, 1024  # beside PyTorch
REPEATS = 12
CHECKED = 3  # first steps, whose losses must agree
# With this, malloc asks the kernel for pages of 2 MiB. XLA allocates its temporary memory anew for
# every step, so that the kernel has to map, and clear, all of it.
PAGES = {"4 KiB": "", "2 MiB": "glibc.malloc.hugetlb=1"}


def run_config(model: DecoderConfig, length: int, tokens: int) -> Config:
    config = Config(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
    )
    data = dataclasses.replace(
        config.data,
        packing="stream",
        sequence_length=length,
        batch_size=max(1, tokens // length),
    )
    return dataclasses.replace(config, data=data)


def parameter_count(program: Program) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params))


def random_tokens(config: Config) -> np.ndarray:
    shape = config.data.batch_size, config.data.sequence_length + 1
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)


def our_step(config: Config) -> tuple[Program, Any, Callable[[], float]]:
    """Returns the program, its first parameters as NumPy arrays, and a step that gives the loss."""
    program = compile_program(config, make_mesh(config.mesh))
    state = program.init()
    params = jax.tree.map(np.array, state.params) if config.model is MODEL else None
    tokens = random_tokens(config)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "segment_ids": ones, "token_bytes": ones}
    batch = jax.device_put(batch, program.batch_sharding)

    def step() -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return program, params, step


def torch_step(config: Config, params: Any) -> Callable[[], float]:
    """Returns the same step in PyTorch: compiled, fused AdamW, attention by SDPA with the bias.

    SDPA with the bias as a mask is its best on a CPU: there FlexAttention has no backward pass.
    """
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

    torch.set_num_threads(os.cpu_count() or 1)
    c, length = config.model, config.data.sequence_length
    at = torch.arange(length)
    distance = (at[:, None] - at[None, :]).float()
    slopes = torch.tensor(np.asarray(alibi_jax.slopes(c.num_heads)))
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)[None]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = c.embed_dim
            self.attention_norm = nn.LayerNorm(width, eps=c.norm_eps)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.mlp_norm = nn.LayerNorm(width, eps=c.norm_eps)
            self.up = nn.Linear(width, c.mlp_size)
            self.down = nn.Linear(c.mlp_size, width)

        def forward(self, x, bias):
            shape = (*x.shape[:2], 3, c.num_heads, c.head_size)
            qkv = self.qkv(self.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
            mixed = scaled_dot_product_attention(*qkv, attn_mask=bias)
            x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
            return x + self.down(gelu(self.up(self.mlp_norm(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(c.vocab_size, c.embed_dim)
            self.blocks = nn.ModuleList(Block() for _ in range(c.num_layers))
            self.final_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)

        def forward(self, tokens, bias):
            x = self.embedding(tokens[:, :-1])
            for block in self.blocks:
                x = block(x, bias)
            logits = self.final_norm(x) @ self.embedding.weight.T
            return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    model = Model()
    with torch.no_grad():
        copy_parameters(model, params)
    assert sum(p.numel() for p in model.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1]
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}],
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        weight_decay=o.weight_decay,
        fused=True,
    )
    compiled = torch.compile(model)
    tokens = torch.tensor(random_tokens(config), dtype=torch.int64)

    def step() -> float:
        loss = compiled(tokens, bias)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def copy_parameters(model: Any, params: Any) -> None:
    """Writes our parameters, stacked over layers, into the PyTorch model."""

    def put(target: Any, value: np.ndarray) -> None:
        target.copy_(target.new_tensor(value).reshape(target.shape))

    def norm(target: Any, ours: Any, at: Any) -> None:
        put(target.weight, ours["scale"][at])
        put(target.bias, ours["bias"][at])

    def linear(target: Any, at: int, *ours: Any) -> None:
        inputs = target.in_features
        put(target.weight, np.concatenate([o["kernel"][at].reshape(inputs, -1).T for o in ours]))
        put(target.bias, np.concatenate([o["bias"][at].ravel() for o in ours]))

    put(model.embedding.weight, params["embedding"])
    norm(model.final_norm, params["final_norm"], ...)
    blocks = params["blocks"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    for i, block in enumerate(model.blocks):
        norm(block.attention_norm, blocks["attention_norm"], i)
        linear(block.qkv, i, *(attention[name] for name in ("query", "key", "value")))
        linear(block.out, i, attention["out"])
        norm(block.mlp_norm, blocks["mlp_norm"], i)
        linear(block.up, i, mlp["up"])
        linear(block.down, i, mlp["down"])


def take_turns(steps: dict[str, Callable[[], float]]) -> dict[str, dict[str, float]]:
    """Times each step REPEATS times, all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": statistics.median(taken), "least_seconds": min(taken)}
        for name, taken in seconds.items()
    }


def against_none() -> dict[str, Any]:
    """Measures the model with ALiBi at 1024 tokens over the same without a position method."""
    programs, steps = {}, {}
    for position in ("alibi", "none"):
        model = dataclasses.replace(MODEL, position=position)
        programs[position], _, steps[position] = our_step(run_config(model, 1024, TOKENS))
        steps[position]()
    sides = take_turns(steps)
    for position, program in programs.items():
        sides[position]["temporary_bytes"] = program.temporary_bytes
    ratios = {name: sides["alibi"][name] / sides["none"][name] for name in sides["none"]}
    return {"length": 1024, "tokens": TOKENS, **sides, "alibi_over_none": ratios}


def against_torch(length: int) -> dict[str, Any]:
    """Measures our step and that of PyTorch, after checking that they are the same step."""
    config = run_config(MODEL, length, TOKENS)
    program, params, step = our_step(config)
    steps = {"alibi_jax": step, "torch": torch_step(config, params)}
    losses = {name: [step() for _ in range(CHECKED)] for name, step in steps.items()}
    np.testing.assert_allclose(losses["alibi_jax"], losses["torch"], rtol=1e-4)
    sides = take_turns(steps)
    for side in sides.values():
        side["tokens_per_second"] = TOKENS / side["seconds"]
    return {
        "length": length,
        "tokens": TOKENS,
        "parameters": parameter_count(program),
        "first_losses": losses,
        **sides,
        "times_faster": sides["torch"]["seconds"] / sides["alibi_jax"]["seconds"],
    }


def on_gpu(position: str, length: int) -> dict[str, Any]:
    """Measures the paper's 1.3B model with one position method at one length."""
    model = dataclasses.replace(PAPER, position=position)
    program, _, step = our_step(run_config(model, length, PAPER_TOKENS))
    step()
    side: dict[str, Any] = take_turns({position: step})[position]
    device, flops = jax.local_devices()[0], flops_per_token(model, length)
    rate, peak = PAPER_TOKENS / side["seconds"], peak_flops(device.device_kind)
    return side | {
        "position": position,
        "length": length,
        "tokens": PAPER_TOKENS,
        "parameters": parameter_count(program),
        "tokens_per_second": rate,
        "model_flops_per_token": flops,
        "mfu": peak and flops * rate / peak,
        "temporary_bytes": program.temporary_bytes,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


MEASURES = {"none": against_none, "torch": against_torch, "gpu": on_gpu}


def run(measure: str, *arguments: Any, tunables: str = "") -> dict[str, Any]:
    """Runs a measure in a process of its own and returns what it found."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--worker"]
    process = subprocess.run(
        [*command, json.dumps([measure, *arguments])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"GLIBC_TUNABLES": tunables},
    )
    row = json.loads(process.stdout.splitlines()[-1])
    print(measure, *arguments, tunables, json.dumps(row, indent=1), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the paper's 1.3B model, on a GPU")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure, *arguments = options.worker
        with jax.set_mesh(make_mesh(Config().mesh)):
            print(json.dumps(MEASURES[measure](*arguments)))
        return
    if options.gpu:
        alibi, sinusoidal = run("gpu", "alibi", 1024), run("gpu", "sinusoidal", 2048)
        names = ("seconds", "temporary_bytes", "peak_bytes")
        ratios = {n: alibi[n] / sinusoidal[n] for n in names if alibi[n]}
        numbers = {"alibi": alibi, "sinusoidal": sinusoidal, "alibi_over_sinusoidal": ratios}
        return write("train_step_gpu", {"repeats": REPEATS, **numbers})
    lengths = LENGTHS if importlib.util.find_spec("torch") else ()
    if not lengths:
        print("torch is not installed: the comparison with it is left out")
    rows = [
        {"pages": pages, "against_none": run("none", tunables=tunables)}
        | {"against_torch": [run("torch", length, tunables=tunables) for length in lengths]}
        for pages, tunables in PAGES.items()
    ]
    write("train_step", {"repeats": REPEATS, "pages": rows})


if __name__ == "__main__":
    main()
