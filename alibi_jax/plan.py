"""What a training run needs on a TPU slice, found by compiling it here, without a TPU.

  alibi plan --config=FILE.py --topology=v5e:16x16 [--config.SECTION.FIELD=VALUE ...] [--json=FILE]

Compiles the whole training step, and the evaluation at the training length and the longest one, for
every chip of the slice, and prints the memory of one device, what a step computes, moves and
communicates, and the least time that the chip's published rates allow for it. If the step does not
fit, other settings are compiled until one does. The exit code is 1 if the step does not fit.

  --topology=CHIP:SHAPE  a slice as Cloud TPU names it: v4:2x2x4, v5e:16x16, v5p:4x4x4, v6e:8x8,
                         tpu7x:2x2x2; config.mesh says how to use it
  --json=FILE            writes every number

Needs libtpu (pip install '.[tpu]'), and for a model of a billion parameters about 2 GB and two
minutes on two CPU cores. Nothing is allocated and no data is read.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from alibi_jax.cli import below, parse_flags
from alibi_jax.config import Config, load_config
from alibi_jax.data.config import trained_tokenizer
from alibi_jax.data.tokenizers import ByteTokenizer, load_tokenizer_file
from alibi_jax.errors import UserError, require
from alibi_jax.files import check_writable, given_path
from alibi_jax.sharding import MESH_AXES, bytes_on_device, make_mesh, spec
from alibi_jax.training import hlo
from alibi_jax.training.chips import CHIPS, GIB, Topology, parse_topology
from alibi_jax.training.flops import flops_per_token
from alibi_jax.training.loop import lower_step
from alibi_jax.training.step import make_loss_fn

# Matrix products of [T, S] by head dim in each kernel of `attention.pallas_tpu`.
KERNEL_PRODUCTS = {"alibi_forward": 2, "alibi_query_gradient": 3, "alibi_key_gradient": 4}

Log = Callable[[str], None]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float
    optimizer: float
    batch: float
    temporaries: float  # activations, gradients, gathered parameters
    code: float
    usable: float  # what the chip has for all these

    @property
    def total(self) -> float:
        """All of them at once."""
        return self.parameters + self.optimizer + self.batch + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether the chip has as much."""
        return self.total <= self.usable


@dataclass(frozen=True)
class Work:
    """What one device does in one run of a program, and the least seconds that it takes.

    Attributes:
      product_flops: of matrix products, recomputed ones included, outside the attention kernels.
      kernel_flops: of the attention kernels, as if no tile were left out but for causality.
      hbm_bytes: moved from and to memory.
      received_bytes: from other devices, by kind of collective.
      seconds: of "compute", "memory" and "network", each alone at the chip's published rate.
    """

    product_flops: float
    kernel_flops: float
    hbm_bytes: float
    received_bytes: dict[str, float]
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """The one that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def floor_seconds(self) -> float:
        """No run of the program can be shorter, however well all three overlap."""
        return max(self.seconds.values())


@dataclass(frozen=True)
class Compiled:
    """A program on the slice: the memory, and the work unless it does not fit."""

    batch: int  # sequences, over all devices
    length: int
    memory: Memory
    work: Work | None
    compile_seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `settings` are those of a try, `{"mesh.fsdp": 16, ...}`."""

    topology: str
    num_devices: int
    device_kind: str
    mesh: dict[str, int]
    num_parameters: int
    gradient_accumulation: int
    remat: str
    model_flops_per_token: float
    peak_flops: float  # of the slice
    step: Compiled
    evaluation: list[Compiled]
    tries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.step.batch * self.step.length

    @property
    def suggestion(self) -> dict[str, Any] | None:
        """Settings with which the step fits, where it does not as it is."""
        return next((tried["settings"] for tried in self.tries if tried["fits"]), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        record = dataclasses.asdict(self) | {"fits": self.step.memory.fits}
        record["step"]["memory"]["total"] = self.step.memory.total
        for program, values in zip(self.evaluation, record["evaluation"], strict=True):
            values["memory"]["total"] = program.memory.total
        if (work := self.step.work) is not None:
            seconds = work.floor_seconds
            record |= {
                "floor_seconds": seconds,
                "bound": work.bound,
                "tokens_per_second": self.tokens / seconds,
                "mfu": self.model_flops_per_token * self.tokens / seconds / self.peak_flops,
            }
        return record | {"suggestion": self.suggestion}


def plan(config: Config, topology: Topology, log: Log = lambda text: None) -> Plan:
    """Compiles a run for a slice.

    Args:
      config: as for training.
      topology: the slice.
      log: told what is being compiled, and how long it took.

    Raises:
      UserError: libtpu is missing or has no such slice, or the config cannot run on it.
    """
    devices = slice_devices(topology)
    config = with_vocabulary(config).with_trained_length()
    config.validate(len(devices))
    mesh = make_mesh(config.mesh, devices)
    step, graphdef, params = compile_step(config, topology, mesh, log)
    lengths = config.evaluation.lengths(config.data.sequence_length)
    found = Plan(
        topology=str(topology),
        num_devices=len(devices),
        device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        gradient_accumulation=config.training.gradient_accumulation,
        remat=config.model.remat,
        model_flops_per_token=flops_per_token(config.model, config.data.sequence_length),
        peak_flops=CHIPS[topology.chip].flops * topology.num_chips,
        step=step,
        evaluation=[
            compile_evaluation(config, topology, mesh, graphdef, params, length, log)
            for length in dict.fromkeys((lengths[0], lengths[-1]))
        ],
    )
    if step.memory.fits:
        return found
    return dataclasses.replace(found, tries=search(config, topology, devices, log))


def slice_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, to compile for; none of them is here."""
    require(
        importlib.util.find_spec("libtpu") is not None,
        "alibi plan compiles with libtpu, which is not installed: pip install '.[tpu]'",
    )
    # libtpu guards the chips of this machine and asks where it runs; here it only compiles.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"  # two cores are one device, as on Cloud TPU
    try:
        return list(topologies.get_topology_desc(str(topology), platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology} is no slice that libtpu knows ({error}): its first two "
            "dimensions must be even, or all of them 1"
        ) from error


def with_vocabulary(config: Config) -> Config:
    """The config with the vocabulary size that its tokenizer will have."""
    if config.model.vocab_size is not None:
        return config
    config.data.validate()
    tokenizer = config.data.tokenizer
    if tokenizer == "bytes":
        size = ByteTokenizer.vocab_size
    elif (trained := trained_tokenizer(tokenizer)) is not None:
        size = trained[1]
    else:
        size = load_tokenizer_file(Path(tokenizer).expanduser()).vocab_size
    return replace(config, {"model.vocab_size": size})


def compile_step(
    config: Config, topology: Topology, mesh: Mesh, log: Log
) -> tuple[Compiled, Any, Any]:
    """Compiles the training step; returns it with the model's structure and abstract parameters."""
    data, parts = config.data, config.training.gradient_accumulation
    with jax.set_mesh(mesh):
        lowered = lower_step(config, mesh)
        state = lowered.state
        held = (state.params, state.opt_state, lowered.batch)
        name = (
            f"the training step, {data.batch_size} × {data.sequence_length} tokens"
            + (f" in {parts} microbatches" if parts > 1 else "")
            + (f", remat={config.model.remat}" if config.model.remat != "none" else "")
            + f", on {_mesh(mesh)}"
        )
        compiled = _compile(lowered.step, name, held, topology, log)
    return (
        Compiled(data.batch_size, data.sequence_length, *compiled),
        lowered.graphdef,
        state.params,
    )


def compile_evaluation(
    config: Config,
    topology: Topology,
    mesh: Mesh,
    graphdef: Any,
    params: Any,
    length: int,
    log: Log,
) -> Compiled:
    """Compiles the losses of as many windows of a length as an evaluation scores at once."""
    multiple = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.evaluation.tokens_per_batch // length
    rows = max(1, -(-rows // multiple)) * multiple
    with jax.set_mesh(mesh):
        partition = spec("batch", None)
        assert partition is not None
        sharding = jax.sharding.NamedSharding(mesh, partition)
        tokens = jax.ShapeDtypeStruct((rows, length + 1), np.int32, sharding=sharding)
        lowered = make_loss_fn(graphdef).lower(params, tokens)
        name = f"the evaluation, {rows} × {length} tokens"
        return Compiled(rows, length, *_compile(lowered, name, (params, (), tokens), topology, log))


def _compile(
    lowered: jax.stages.Lowered, name: str, held: tuple[Any, Any, Any], topology: Topology, log: Log
) -> tuple[Memory, Work | None, float]:
    """Memory, work and seconds of compiling; `held`: parameters, optimizer, batch."""
    chip = CHIPS[topology.chip]
    usable = chip.usable_hbm_bytes / chip.devices
    parameters, optimizer, batch = (float(bytes_on_device(tree)) for tree in held)
    arguments = parameters + optimizer + batch
    log(f"compiling {name}")
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries = _needed_temporaries(str(error), arguments)
        if temporaries is None:
            raise
        seconds = time.perf_counter() - start
        memory = Memory(parameters, optimizer, batch, temporaries, 0.0, usable)
        log(f"  {seconds:.0f} s: does not fit, {_gib(memory.total)} of {_gib(usable)}")
        return memory, None, seconds
    seconds = time.perf_counter() - start
    log(f"  {seconds:.0f} s")
    analysis: Any = compiled.memory_analysis()
    # What is donated is an argument and a result at once. XLA's arguments are a little larger than
    # ours where their last axes are no whole tiles.
    temporaries = analysis.argument_size_in_bytes - arguments + analysis.temp_size_in_bytes
    temporaries += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    code = analysis.generated_code_size_in_bytes
    memory = Memory(parameters, optimizer, batch, temporaries, code, usable)
    return memory, work(hlo.count(compiled.as_text() or ""), topology), seconds


def _needed_temporaries(message: str, arguments: float) -> float | None:
    """Bytes that XLA says it needs beside the arguments; None if that is not what it says."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    of_temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    of_all = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    match = of_temporaries or of_all
    if match is None:
        return None
    needed = float(match[1]) * units[match[2]]
    return needed if of_temporaries else needed - arguments


def work(cost: hlo.Cost, topology: Topology) -> Work:
    """What a program does, at the published rates of the chips.

    Two devices of a chip share its memory and its links; what both receive is taken to arrive once.
    """
    chip = CHIPS[topology.chip]
    kernel_flops = sum(
        times * KERNEL_PRODUCTS[kernel.name] * _causal_product(*kernel.shapes)
        for kernel, times in cost.kernels.items()
        if kernel.name in KERNEL_PRODUCTS
    )
    received = sum(cost.received_bytes.values())
    return Work(
        product_flops=cost.flops,
        kernel_flops=kernel_flops,
        hbm_bytes=cost.hbm_bytes,
        received_bytes=cost.received_bytes,
        seconds={
            "compute": (cost.flops + kernel_flops) * chip.devices / chip.flops,
            "memory": cost.hbm_bytes * chip.devices / chip.hbm_bandwidth,
            "network": received / chip.receives(topology.shape) if received else 0.0,
        },
    )


def _causal_product(query: tuple[int, ...], key: tuple[int, ...]) -> float:
    """FLOPs of the logits of query [B, H, T, D] and key [B, K, S, D] that causality leaves."""
    batch, heads, length, dim = query
    pairs = length * (2 * key[2] - length + 1) / 2
    return 2.0 * batch * heads * pairs * dim


# When it does not fit


def search(
    config: Config, topology: Topology, devices: list[jax.Device], log: Log
) -> list[dict[str, Any]]:
    """Compiles one candidate after the other, up to the first that fits."""
    tries: list[dict[str, Any]] = []
    for settings in candidates(config, len(devices)):
        changed = replace(config, settings)
        step, *_ = compile_step(changed, topology, make_mesh(changed.mesh, devices), log)
        total, fits = step.memory.total, step.memory.fits
        tries.append({"settings": settings, "total": total, "fits": fits})
        if fits:
            break
    return tries


def candidates(config: Config, num_devices: int) -> Iterator[dict[str, Any]]:
    """Settings that need less and less memory on a device, the cheapest first.

    Parameters in more shards, then recomputation, then more microbatches, then also heads and MLPs
    in shards; each only if the config is valid with it.
    """
    sizes = dict(zip(MESH_AXES, config.mesh.sizes(num_devices), strict=True))
    settings: dict[str, Any] = {}

    def valid(changes: dict[str, Any]) -> bool:
        try:
            replace(config, settings | changes).validate(num_devices)
        except UserError:
            return False
        return True

    def widest(batch_shards: int, tensor: int) -> dict[str, Any] | None:
        """All of data and fsdp that can be for fsdp."""
        for fsdp in range(batch_shards, 0, -1):
            if batch_shards % fsdp == 0:
                changes = {
                    "mesh.data": batch_shards // fsdp,
                    "mesh.fsdp": fsdp,
                    "mesh.tensor": tensor,
                }
                if valid(changes):
                    return changes
        return None

    shards = sizes["data"] * sizes["fsdp"]
    mesh = widest(shards, sizes["tensor"])
    if mesh is not None and mesh["mesh.fsdp"] > sizes["fsdp"]:
        settings |= mesh
        yield dict(settings)
    if config.model.remat != "full":
        settings["model.remat"] = "full"
        yield dict(settings)
    parts = 2 * config.training.gradient_accumulation
    while valid({"training.gradient_accumulation": parts}):
        settings["training.gradient_accumulation"] = parts
        yield dict(settings)
        parts *= 2
    tensor = 2 * sizes["tensor"]
    while shards * sizes["tensor"] % tensor == 0:
        mesh = widest(shards * sizes["tensor"] // tensor, tensor)
        if mesh is not None:
            yield settings | mesh
        tensor *= 2


def replace(config: Config, settings: dict[str, Any]) -> Config:
    """The config with fields, such as "model.remat", set."""
    for name, value in settings.items():
        section, attribute = name.split(".")
        changed = dataclasses.replace(getattr(config, section), **{attribute: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


# For a person to read


def table(found: Plan) -> str:
    """The plan in lines."""
    step, memory = found.step, found.step.memory
    axes = ", ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    parts = found.gradient_accumulation
    rows = [
        ("slice", f"{found.topology}: {found.num_devices} × {found.device_kind}; {axes}"),
        ("model", f"{found.num_parameters:,} parameters"),
        (
            "step",
            f"{step.batch} × {step.length} = {found.tokens:,} tokens"
            + (f" in {parts} microbatches" if parts > 1 else "")
            + (f", remat={found.remat}" if found.remat != "none" else ""),
        ),
        ("memory", "of one device"),
        ("  parameters", _gib(memory.parameters)),
        ("  optimizer", _gib(memory.optimizer)),
        ("  batch", _gib(memory.batch)),
        ("  temporaries", f"{_gib(memory.temporaries)}: activations, gradients, buffers"),
        ("  code", _gib(memory.code)),
        ("  total", f"{_gib(memory.total)} of {_gib(memory.usable)}: {_fits(memory)}"),
    ]
    for program in found.evaluation:
        need = program.memory
        rows.append(
            (
                "evaluation",
                f"{program.batch} × {program.length} tokens at once: {_gib(need.total)} of "
                f"{_gib(need.usable)}: {_fits(need)}"
                + (
                    ""
                    if need.fits
                    else "; lower config.evaluation.tokens_per_batch or shorten "
                    "config.evaluation.multiples"
                ),
            )
        )
    if step.work is not None:
        rows += _work_rows(found, step.work)
    lines = [f"{name:<14} {text}" for name, text in rows]
    if found.suggestion is not None:
        flags = " ".join(_flag(name, value) for name, value in found.suggestion.items())
        lines.append(f"It fits with {flags} ({_gib(found.tries[-1]['total'])}).")
    elif not memory.fits:
        lines.append(
            f"Nothing that was tried fits ({len(found.tries)} settings): take a larger slice, a "
            "smaller model or shorter sequences."
        )
    return "\n".join(lines)


def _work_rows(found: Plan, done: Work) -> list[tuple[str, str]]:
    record = found.to_dict()
    model = found.model_flops_per_token * found.tokens
    received = sum(done.received_bytes.values())
    kinds = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in done.received_bytes.items())
    flops = (done.product_flops + done.kernel_flops) * found.num_devices
    return [
        (
            "FLOPs",
            f"{model:.3g} a step by the model ({found.model_flops_per_token:.3g} a token), "
            f"{flops:.3g} as compiled",
        ),
        ("floor", f"of a step on one device; {done.bound} binds"),
        (
            "  compute",
            f"{done.seconds['compute']:.4f} s for "
            f"{(done.product_flops + done.kernel_flops) / 1e12:.2f} TFLOP",
        ),
        ("  memory", f"{done.seconds['memory']:.4f} s for {done.hbm_bytes / 1e9:.2f} GB moved"),
        (
            "  network",
            f"{done.seconds['network']:.4f} s for {received / 1e9:.2f} GB received"
            + (f" ({kinds})" if kinds else ""),
        ),
        (
            "at most",
            f"{record['tokens_per_second']:,.0f} tokens/s, MFU {100 * record['mfu']:.0f}%: what "
            "the published rates allow, not a prediction",
        ),
    ]


def _mesh(mesh: Mesh) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def _fits(memory: Memory) -> str:
    return "fits" if memory.fits else "DOES NOT FIT"


def _flag(name: str, value: Any) -> str:
    return f"--config.{name}={str(value).lower() if isinstance(value, bool) else value}"


def _gib(num_bytes: float) -> str:
    size = f"{num_bytes / GIB:,.2f} GiB"
    return size if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def main(arguments: list[str]) -> int:
    """`alibi plan`: 0 if the step fits, 1 if not."""
    flags = parse_flags(arguments, ("--config", "--topology", "--json", "--config."))
    for name, example in (("--config", "configs/quickstart.py"), ("--topology", "v5e:4x4")):
        require(bool(flags.get(name)), f"{name} is missing: give {name}={example}")
    topology, output = parse_topology(flags["--topology"]), None
    config = load_config(flags["--config"], below("--config.", flags))
    if flags.get("--json"):
        output = given_path("--json", flags["--json"])
        check_writable("--json", output)

    # What this machine has does not matter: it compiles for others.
    jax.config.update("jax_platforms", "cpu")
    found = plan(config, topology, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(found))
    if output is not None:
        output.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0 if found.step.memory.fits else 1
