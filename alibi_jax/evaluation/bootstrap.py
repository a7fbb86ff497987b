"""Intervals by resampling whole documents.

Tokens of one document are alike, so the document is the unit that is resampled (the cluster
bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Every
number of the report is a ratio of two totals over documents, such as nats over tokens. Both totals
of a ratio, and every length, come from the same resamples, so a change between lengths is paired
and its interval far tighter than that of either loss.

Percentile intervals of few documents are too narrow: resamples spread like a variance over n, not
n - 1, and their quantiles are a normal's, not Student's (Hesterberg, What Teachers Should Know
About the Bootstrap, The American Statistician 69, 2015). So whatever is read off resamples is read
off widened ones, which lie further from the point estimate by a factor of
t(n - 1) / z * sqrt(n / (n - 1)) at 97.5%: 1.9 with 4 documents, 1.2 with 10, 1.02 with 100.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtri, stdtrit

FEW = 10  # documents; with fewer, an interval is wide and says little of its own shape
_SEED = 0  # the same losses always get the same intervals


def document_sums(values: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Add up the values of each document.

    Args:
        values: [N, P], one row per window.
        document: int [N], the document of each window.

    Returns:
        float64 [num_documents].
    """
    _, index = np.unique(document, return_inverse=True)
    return np.bincount(index, weights=values.sum(axis=1, dtype=np.float64))


def resamples(num_documents: int, num_bootstrap: int) -> np.ndarray:
    """Draw documents with replacement.

    Returns:
        int64 [num_bootstrap, num_documents], how often each resample holds each document.
    """
    rng = np.random.default_rng(_SEED)
    probabilities = np.full(num_documents, 1 / num_documents)
    return rng.multinomial(num_documents, probabilities, size=num_bootstrap)


def widened(point: np.ndarray | float, drawn: np.ndarray, num_documents: int) -> np.ndarray:
    """Move resamples away from the point estimate, as far as few documents need.

    Args:
        point: float64 [...], of all documents.
        drawn: float64 [num_bootstrap, ...], of the resamples.
        num_documents: How many documents each resample has, at least 2.

    Returns:
        float64 [num_bootstrap, ...]; where the point estimate is not finite, what was drawn.
    """
    n = num_documents
    factor = float(stdtrit(n - 1, 0.975) / ndtri(0.975)) * math.sqrt(n / (n - 1))
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(point), point + factor * (drawn - point), drawn)


def interval(
    numerator: np.ndarray, denominator: np.ndarray, counts: np.ndarray
) -> list[float] | None:
    """Compute the 95% interval of sum(numerator) / sum(denominator): widened percentiles.

    Args:
        numerator: float64 [num_documents].
        denominator: float64 [num_documents].
        counts: int [num_bootstrap, num_documents], from `resamples`.

    Returns:
        [low, high], or None where there is none: with one document, or a total that is not finite.
    """
    if counts.shape[1] < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (counts @ numerator) / (counts @ denominator)
        point = numerator.sum() / denominator.sum()
    if not np.isfinite(ratios).all():
        return None
    low, high = np.percentile(widened(point, ratios, counts.shape[1]), [2.5, 97.5])
    return [float(low), float(high)]


def interval_of_a_length(
    find: Callable[[np.ndarray], np.ndarray], totals: np.ndarray, counts: np.ndarray
) -> list[int] | None:
    """Compute the 95% interval of a length that is read off several losses.

    A length cannot be widened itself, but the losses can that decide it: it is read off totals
    whose logarithms are widened. What decides is the ratio of two losses, and its logarithm is
    then widened by the same factor.

    Args:
        find: From totals float64 [R, L] over the documents of R resamples, one for each of L
            settings, to the length in each resample, int [R].
        totals: float64 [L, num_documents], at least 0.
        counts: int [num_bootstrap, num_documents], from `resamples`.

    Returns:
        [low, high], both of them lengths that came up, or None with one document.
    """
    if counts.shape[1] < 2:
        return None
    # Not a matrix product, in which an infinite loss of one document would be nan in all.
    with np.errstate(invalid="ignore"):
        drawn = np.stack([np.where(counts > 0, counts * row, 0).sum(axis=1) for row in totals], 1)
    with np.errstate(divide="ignore"):
        logs = widened(np.log(totals.sum(axis=1)), np.log(drawn), counts.shape[1])
    drawn = np.exp(logs)
    low, high = np.percentile(find(drawn), [2.5, 97.5], method="inverted_cdf")
    return [int(low), int(high)]


def wilson(hits: np.ndarray) -> list[float]:
    """Compute a 95% interval of a rate of hits (Wilson, JASA 22, 1927).

    Hits of one trial may be alike, so they count for as many independent ones as their spread over
    trials says: rate (1 - rate) / variance of the rate (Kish, Survey Sampling, 1965), which is at
    least the number of trials and at most that of hits. Where all or none hit there is no spread
    to see, and it is the number of trials.

    Args:
        hits: bool or 0 and 1 [num_trials, P].

    Returns:
        [low, high].
    """
    num_trials, rate, z = len(hits), float(hits.mean()), 1.959964
    size = float(num_trials)
    if num_trials > 1 and 0 < rate < 1:
        variance = float(hits.mean(axis=1).var(ddof=1)) / num_trials
        independent = rate * (1 - rate) / variance if variance else np.inf
        size = float(np.clip(independent, num_trials, hits.size))
    centre = (rate + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(rate * (1 - rate) / size + z**2 / (4 * size**2))
    return [max(0.0, float(centre - half)), min(1.0, float(centre + half))]
