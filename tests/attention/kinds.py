"""Biases to test with, each beside its formula in numpy and float64.

Those that the models have are here with their own functions and bounds. "shifted" is one that is
neither always falling nor largest nearby, and "fire" a small one of FIRE's form, without a bound.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alibi_jax.attention.biases import DistanceBias, LinearBias, PrefixBias
from alibi_jax.models.positions import bam, kerple, t5
from tests.models import position_formulas


class Kind(NamedTuple):
    """How to make one kind of bias.

    Attributes:
      params: `(rng, batch, key length, heads)` to numpy arrays, float32.
      bias: `(params, number of queries)` to what `attention` takes.
      formula: `(params, b, h, t, distance, position, number of queries)` to a row, float64.
    """

    params: Any
    bias: Any
    formula: Any
    sink: bool = False


def of_distance(function, upper, params, formula):
    """Return the kind of a function of distance; `formula` takes the parameters of one head."""

    def row(p, b, h, t, distance, position, length):
        p = jax.tree.map(lambda x: np.float64(x[h]), p)
        return formula(p, np.float64(distance), np.float64(position))

    return Kind(
        lambda rng, batch, length, heads: params(rng, heads),
        lambda p, length: DistanceBias(function, p, upper),
        row,
    )


def as_float(distance):
    return distance.astype(jnp.float32)


def shifted(p, distance, position=None):
    """Neither always falling nor bounded by what is near: most at the distance mu."""
    d = jnp.abs(as_float(distance) - p["mu"]) + 0.1
    return -jnp.exp(p["s"]) * d ** p["beta"]


def shifted_upper(p, distance):
    d = jnp.maximum(as_float(distance) - p["mu"], 0.0) + 0.1
    rising = jnp.zeros_like(d)  # beta < 0: towards 0 far away
    return jnp.where(p["beta"] < 0, rising, -jnp.exp(p["s"]) * d ** p["beta"])


def fire(p, distance, position):
    """A small network of log distance over log position (FIRE, Li et al., ICLR 2024)."""
    limit = jnp.log1p(p["c"] * jnp.maximum(as_float(position), p["least"]))
    x = jnp.log1p(p["c"] * as_float(distance)) / limit
    units = [p["out"][n] * jnp.tanh(p["weight"][n] * x + p["shift"][n]) for n in range(3)]
    return units[0] + units[1] + units[2]


def fire_formula(p, d, position):
    x = np.log(p["c"] * d + 1) / np.log(p["c"] * np.maximum(position, p["least"]) + 1)
    return np.tanh(x[:, None] * p["weight"] + p["shift"]) @ p["out"]


def float32(tree):
    return jax.tree.map(np.float32, tree)


def linear(sink):
    return Kind(
        lambda rng, batch, length, heads: np.float32(rng.uniform(0.05, 1.5, heads)),
        lambda p, length: LinearBias(p, sink),
        lambda p, b, h, t, distance, position, length: -np.float64(p[h]) * distance,
        sink,
    )


def prefix_row(p, b, h, t, distance, position, length):
    c = np.cumsum(np.float64(p[b, :, h]))
    return c[len(c) - length + t] - c


KINDS = {
    "linear": linear(False),
    "sink": linear(True),
    "kerple_log": of_distance(
        kerple._log,
        kerple._log,
        lambda rng, heads: float32((rng.uniform(1, 9, heads), rng.uniform(0, 2, heads))),
        lambda p, d, i: position_formulas.kerple_log(*p, d, head_dim=1),
    ),
    "kerple_power": of_distance(
        kerple._power,
        kerple._power,
        lambda rng, heads: float32((rng.uniform(0, 1, heads), rng.uniform(0.3, 2, heads))),
        lambda p, d, i: position_formulas.kerple_power(p[1], p[0], d, head_dim=1),
    ),
    "t5": of_distance(
        t5._function,
        t5._upper,
        lambda rng, heads: float32(rng.normal(size=(heads, t5.MAX_DISTANCE + 1))),
        lambda p, d, i: p[np.minimum(d, t5.MAX_DISTANCE).astype(int)],
    ),
    "bam": of_distance(
        bam._function,
        bam._upper,
        lambda rng, heads: float32((rng.normal(size=heads) - 1, rng.uniform(-1, 2, heads))),
        lambda p, d, i: position_formulas.bam(np.exp(p[0]), p[1], d),
    ),
    "shifted": of_distance(
        shifted,
        shifted_upper,
        lambda rng, heads: float32(
            {
                "s": rng.normal(size=heads) - 1,
                "mu": rng.uniform(0, 50, heads),
                "beta": rng.choice([-1.0, 0.5, 1.0], heads),
            }
        ),
        lambda p, d, i: -np.exp(p["s"]) * (np.abs(d - p["mu"]) + 0.1) ** p["beta"],
    ),
    "fire": of_distance(
        fire,
        None,
        lambda rng, heads: float32(
            {
                "c": rng.uniform(0.1, 2, heads),
                "least": rng.uniform(3, 9, heads),
                "weight": rng.normal(size=(heads, 3)),
                "shift": rng.normal(size=(heads, 3)),
                "out": 2 * rng.normal(size=(heads, 3)),
            }
        ),
        fire_formula,
    ),
    "prefix": Kind(
        lambda rng, *sizes: np.float32(-rng.lognormal(-2, 1.5, sizes)),
        lambda p, length: PrefixBias.from_log_gates(p, num_queries=length),
        prefix_row,
    ),
}
