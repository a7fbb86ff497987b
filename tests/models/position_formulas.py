"""Position methods in float64 numpy, written from the papers, one head and one pair at a time."""

import math

import numpy as np


def t5_bucket(distance):
    """Raffel et al., T5: 32 buckets up to 128, causal."""
    if distance < 16:
        return distance
    return min(31, 16 + math.floor(math.log(distance / 16) / math.log(128 / 16) * 16))


def kerple_log(p, a, distance, head_dim):
    return -p * np.log(1 + a * distance) / np.sqrt(head_dim)


def kerple_power(p, a, distance, head_dim):
    return -a * distance**p / np.sqrt(head_dim)


def bam(scale, exponent, distance):
    return -scale * (distance + 1e-5) ** exponent


def fire(c, limit, mlp, distance, position):
    def psi(x):
        return np.log(c * x + 1)

    x = psi(distance) / (psi(np.maximum(position, limit)) + 1e-6)
    hidden = np.maximum(np.multiply.outer(x, mlp["hidden"]) + mlp["hidden_shift"], 0)
    return hidden @ mlp["out"] + mlp["out_shift"]


def forgetting(gates, i, j):
    """The sum of the logarithms of the gates of tokens j+1 .. i."""
    return math.fsum(math.log(gate) for gate in gates[j + 1 : i + 1])


def rotated(x, position, frequencies):
    """Dimension k and k + D/2 are one complex number, which the position turns."""
    half = len(frequencies)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rotary_frequencies(head_dim, base=10_000.0):
    return np.array([base ** (-2 * k / head_dim) for k in range(head_dim // 2)])


def yarn_frequencies(head_dim, factor, trained_length):
    """`find_correction_range` and `linear_ramp_mask` of the authors' code, beta 32 and 1."""

    def dim_of(rotations):
        log = math.log(trained_length / (rotations * 2 * math.pi))
        return head_dim * log / (2 * math.log(10_000))

    low = max(math.floor(dim_of(32)), 0)
    high = min(math.ceil(dim_of(1)), head_dim - 1)
    frequencies = []
    for k, plain in enumerate(rotary_frequencies(head_dim)):
        extrapolated = 1 - min(max((k - low) / (high - low), 0), 1)
        frequencies.append(plain / factor * (1 - extrapolated) + plain * extrapolated)
    return np.array(frequencies)
