"""What the choice of an implementation depends on."""

from typing import NamedTuple

import jax.numpy as jnp


class Case(NamedTuple):
    """What the choice depends on: all of it is static."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: jnp.dtype
    batch: int
    heads: int
    length: int  # queries
    key_length: int
    head_dim: int
    value_dim: int
    causal: bool
    aligned: bool  # positions were not given: the ends are aligned
    segmented: bool
    shared_segments: bool  # key_segment_ids were not given: a query's own key is of its segment
    scale: float | None  # None: an array, which may be known only when it runs
    capability: tuple[int, int] | None  # CUDA compute capability, such as (9, 0); None without
    length_sharded: bool = False  # the queries of a sequence are divided over devices
    beyond_slopes: str | None = None  # what there is other than -slope * distance, such as "window"


def refusal_beyond_slopes(case: Case) -> str | None:
    """Return why an implementation that only knows `-slope * distance` cannot serve a case."""
    if case.beyond_slopes is None:
        return None
    return f"takes slopes alone, and no {case.beyond_slopes}"
