"""Which implementation of attention runs, and why one cannot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alibi_jax.attention.blockwise import blockwise
from alibi_jax.attention.dense import dense
from alibi_jax.typing import Attended

# Up to this many logits a head, holding them all is faster than going tile by tile
# (benchmarks/results/attention_cpu.json).
SMALL = 512 * 512


class Case(NamedTuple):
    """What the choice depends on: all of it is static."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: jnp.dtype
    length: int  # queries
    key_length: int
    head_dim: int
    value_dim: int
    causal: bool
    aligned: bool  # positions were not given: the ends are aligned
    segmented: bool


def serves_all(case: Case) -> str | None:
    """Refuse nothing."""
    return None


class Implementation(NamedTuple):
    """A function with the arguments of `dense`, and why it refuses a case (None: it serves)."""

    attend: Callable[..., Attended]
    refusal: Callable[[Case], str | None] = serves_all


IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": Implementation(dense),
    "blockwise": Implementation(blockwise),
}


def choose(case: Case) -> str:
    """Return the name of the implementation that serves a case best."""
    if case.length * case.key_length <= SMALL:
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
        raise ValueError(f"implementation={name!r} {reason}; here {others} can serve, or None")


def platform() -> str:
    """Return where the computation will run: on the mesh's devices, or else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name
