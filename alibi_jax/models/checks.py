"""What a decoder is given, checked where its values are known: inside `jit` they are not."""

from typing import Any

import jax.numpy as jnp

from alibi_jax.bias import check_integer, values_of
from alibi_jax.typing import Tokens


def as_ids(name: str, ids: Any, vocab_size: int) -> Tokens:
    """Token ids as an array [B, T]; raises ValueError for one outside the vocabulary."""
    known = values_of(ids)
    if known is not None and known.size and not 0 <= known.min() <= known.max() < vocab_size:
        wrong = known.min() if known.min() < 0 else known.max()
        raise ValueError(f"{name} must be from 0 to {vocab_size - 1}, the vocabulary; got {wrong}")
    ids = jnp.asarray(ids)
    check_integer(name, ids)
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [batch, length], got the shape {ids.shape}")
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
