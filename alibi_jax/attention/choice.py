"""Which implementation of attention runs, and why one cannot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from alibi_jax.attention import blockwise, columns, pallas_tpu
from alibi_jax.attention.case import Case
from alibi_jax.attention.dense import dense
from alibi_jax.typing import Attended

# Up to this many logits a head, holding them all is faster than going tile by tile: on a CPU
# (benchmarks/results/attention_cpu.json), and elsewhere (a judgement).
SMALL_ON_CPU, SMALL = 256 * 256, 512 * 512
# Blockwise takes one tile after the other, each too small for a GPU: there, where cuDNN refuses,
# all logits are held up to this many bytes. (A judgement: not yet measured on a GPU.)
SMALL_ON_GPU = 2**31


def refusal_dense(case: Case) -> str | None:
    """Return why `dense` cannot serve a case, or None if it can."""
    if case.length_sharded:
        return "needs whole sequences, and these are divided over devices"
    return None


class Implementation(NamedTuple):
    """A function with the arguments of `dense`, and why it refuses a case (None: it serves).

    One without `any_bias` takes an array of slopes in the place of a bias, and no window. One with
    `fixed_scale` takes a scale that is a Python number alone. `constants` are those of its module
    that its programs depend on.
    """

    attend: Callable[..., Attended]
    refusal: Callable[[Case], str | None]
    any_bias: bool = False
    fixed_scale: bool = False
    constants: Callable[[], tuple[Any, ...]] = tuple


IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": Implementation(dense, refusal_dense, any_bias=True),
    "blockwise": Implementation(
        blockwise.blockwise,
        blockwise.refusal,
        any_bias=True,
        constants=lambda: (blockwise.QUERY_TILE, blockwise.KEY_TILE, blockwise.STEP),
    ),
    "pallas_tpu": Implementation(
        pallas_tpu.pallas_tpu,
        pallas_tpu.refusal,
        constants=lambda: (pallas_tpu.QUERY_TILE, pallas_tpu.KEY_TILE, pallas_tpu.INTERPRET),
    ),
    "cudnn": Implementation(columns.cudnn, columns.refusal_cudnn, fixed_scale=True),
    "splash": Implementation(columns.splash, columns.refusal_splash),
}


def choose(case: Case) -> str:
    """Return the name of the implementation that serves a case best.

    Where sequences are divided over devices it is one that goes by tiles, however short they are.
    """
    logits = case.length * case.key_length
    small = SMALL_ON_CPU if case.platform == "cpu" else SMALL
    if logits <= small and not case.length_sharded:
        return "dense"
    if case.platform == "tpu" and pallas_tpu.refusal(case) is None:
        return "pallas_tpu"
    if case.platform == "gpu":
        if columns.refusal_cudnn(case) is None:
            return "cudnn"
        if not case.length_sharded and 4 * case.batch * case.heads * logits <= SMALL_ON_GPU:
            return "dense"
    return "blockwise"


def require_serves(name: Any, case: Case) -> None:
    """Raise a ValueError that says why, if an implementation is unknown or refuses a case."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {[*IMPLEMENTATIONS]}, got {name!r}"
        )
    reason = IMPLEMENTATIONS[name].refusal(case)
    if reason is not None:
        others = [n for n, other in IMPLEMENTATIONS.items() if other.refusal(case) is None]
        raise ValueError(
            f"implementation={name!r} {reason}; "
            + (f"here {others} can serve, or None" if others else "here no other can serve either")
        )


def platform() -> str:
    """Return where the computation will run: on the mesh's devices, or else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # type: ignore[attr-defined]
    name = getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def capability() -> tuple[int, int] | None:
    """Return the CUDA compute capability of the first device here, or None if it has none."""
    version = getattr(jax.local_devices()[0], "compute_capability", "")
    major, _, minor = version.partition(".")
    return (int(major), int(minor)) if major.isdigit() else None  # ROCm says "gfx942"
