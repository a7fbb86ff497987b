"""What a decoder is given, checked where its values are known: inside `jit` they are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alibi_jax.bias import as_int32_limit, check_integer, is_known
from alibi_jax.typing import Array, Tokens


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


def as_window(window: Any) -> Array | None:
    """A window as an array i32[], or None; raises ValueError if it is not at least 1."""
    if window is None:
        return None
    if jnp.shape(window) != ():
        raise ValueError(f"window must be a scalar, got the shape {jnp.shape(window)}")
    known = values_of(window)
    if known is not None and not 1 <= known < 2**31:
        raise ValueError(f"window must be an integer from 1 to 2^31 - 1, or None; got {window}")
    window = jnp.asarray(window)
    check_integer("window", window)
    return as_int32_limit(window)


def values_of(x: Any) -> np.ndarray | None:
    """The values of x; None if it is traced, or in part on devices of other processes."""
    if not is_known(x) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)
