"""What a run resolved to, for a person to read before step 0."""

import math

import jax
from jax.sharding import Mesh

from alibi_jax.config import Config
from alibi_jax.data import Corpus
from alibi_jax.sharding import bytes_on_device
from alibi_jax.training import compilation_cache
from alibi_jax.training.chips import peak_flops
from alibi_jax.training.flops import flops_per_token
from alibi_jax.training.loop import Program


def resolved(config: Config, corpus: Corpus, mesh: Mesh, program: Program) -> str:
    """Lines that say what was chosen and what it costs; bytes are those on one device."""
    batch, length = config.data.batch_size, config.data.sequence_length
    parts = config.training.gradient_accumulation
    per_device = batch // (mesh.shape["data"] * mesh.shape["fsdp"] * parts)
    splits = ", ".join(
        f"{name} {split.num_bytes / 1e6:.1f} MB in {split.num_documents}"
        for name, split in (("train", corpus.train), ("valid", corpus.valid), ("test", corpus.test))
    )
    microbatches = f" in {parts} microbatches" if parts > 1 else ""
    device = jax.devices()[0]
    params, optimizer = program.state.params, program.state.opt_state
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    rows = {
        "devices": f"{jax.device_count()} × {device.device_kind} ({device.platform})"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "mesh": ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "data": f"{config.data.source}: {splits} documents; {corpus.tokenizer.vocab_size} tokens",
        "batch": f"{batch} sequences × {length} tokens{microbatches}; {per_device} a device",
        "position": config.model.position,
        "parameters": f"{count:,}: {_size(bytes_on_device(params))}",
        "optimizer": _size(bytes_on_device(optimizer)),
        "step": f"{_size(program.temporary_bytes)} of temporaries; compiled in "
        f"{program.compile_seconds:.1f} s, {_kept()}",
        "model FLOPs": f"{flops_per_token(config.model, length):.3g} a token, {_peak(device)}",
    }
    return "\n".join(f"{name:<11} {text}" for name, text in rows.items())


def _kept() -> str:
    directory = compilation_cache.directory()
    return f"kept in {directory}" if directory else "not kept (no JAX_COMPILATION_CACHE_DIR)"


def _peak(device: jax.Device) -> str:
    peak = peak_flops(device.device_kind)
    return "at a peak that is not known" if peak is None else f"at most {peak:.3g}/s a device"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"
