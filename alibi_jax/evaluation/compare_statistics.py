"""Statistics of a comparison: what another seed, and what other text, might change.

Two things are random in a comparison, and each number has an interval for either:

- the seed, that is, the initial parameters and the order of the data. Methods share both at equal
  seeds, so differences between methods are taken seed by seed (paired), and Student's t with n - 1
  degrees of freedom gives the 95% interval of the mean over n seeds. It assumes that values of
  different seeds are normal, which a few seeds cannot show; with few seeds it is wide.
- the held-out documents. The loss of each document is averaged over the seeds that were trained,
  and documents are resampled (`alibi_jax.evaluation.bootstrap`); methods are compared on the same
  resamples. This interval says nothing about other seeds.
"""

import math
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from alibi_jax.evaluation import bootstrap
from alibi_jax.evaluation.report import finite

CONFIDENCE = 0.95


def t_interval(values: np.ndarray) -> list[float] | None:
    """The 95% interval of Student's t for the mean of independent normal values.

    Args:
      values: float64 [seeds].

    Returns:
      [low, high]; None with fewer than two values, or where one is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * _standard_error(values)
    return [float(values.mean()) - half, float(values.mean()) + half]


def p_value(differences: np.ndarray) -> float | None:
    """Two-sided p-value of Student's t test that the mean of normal values is zero.

    Args:
      differences: float64 [seeds], of two methods with equal seeds.

    Returns:
      From 0 to 1; None with fewer than two values, where one is not finite or all are the same.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    error = _standard_error(differences)
    if error == 0:
        return None
    return float(2 * stdtr(len(differences) - 1, -abs(float(differences.mean())) / error))


def estimate(nats: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """The mean over seeds of nats per token, with an interval over seeds and one over documents.

    Args:
      nats: float64 [seeds, documents], total of each document; of a method, or of a method minus
        another.
      tokens: float64 [documents], how many tokens these totals are of.
      counts: int [resamples, documents], from `bootstrap.resamples`.

    Returns:
      "mean"; "interval", `t_interval`; "document_interval", of the bootstrap; "seeds", the value
      of each. None stands for what is not finite or cannot be known.
    """
    values = nats.sum(axis=1) / tokens.sum()
    return {
        "mean": finite(values.mean()),
        "interval": t_interval(values),
        "document_interval": bootstrap.interval(nats.mean(axis=0), tokens, counts),
        "seeds": [finite(value) for value in values],
    }


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
