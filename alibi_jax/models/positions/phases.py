"""Angles that stay right at any position."""

import jax.numpy as jnp
import numpy as np

from alibi_jax.typing import Array, Float, QueryPositions

UNIT = 2.0**32 / (2.0 * np.pi)  # units of 2^-32 of a turn in a radian


def angles(positions: QueryPositions, frequencies: np.ndarray) -> Float[Array, "B T N"]:
    """Angles `positions * frequencies`, modulo 2 pi.

    A product in float32 is off by 0.01 at position 100,000. Here an angle is counted in units of
    2^-32 of a turn, which int32 multiplies exactly and wraps by itself, and is right to 1e-6.

    Args:
      positions: i32[B, T].
      frequencies: radians a position, float64[N], at least 0 and at most 1.

    Returns:
      f32[B, T, N], from -pi to pi.
    """
    whole, rest = np.divmod(np.asarray(frequencies, np.float64) * UNIT, 1.0)
    positions = positions[..., None].astype(jnp.int32)
    turned = positions * jnp.asarray(whole.astype(np.int32))[None, None, :]
    # Below 2^17 units at positions below 2^17: float32 gives them to a hundredth.
    further = positions.astype(jnp.float32) * jnp.asarray(rest, jnp.float32)[None, None, :]
    turned += jnp.round(further).astype(jnp.int32)
    return turned.astype(jnp.float32) * np.float32(1.0 / UNIT)
