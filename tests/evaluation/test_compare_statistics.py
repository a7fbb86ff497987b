"""Intervals and p-values over seeds against closed forms."""

import math

import numpy as np
import pytest

from alibi_jax.evaluation.bootstrap import resamples
from alibi_jax.evaluation.compare_statistics import estimate, p_value, t_interval

# Student's t: 97.5th percentiles of any printed table, by degrees of freedom.
TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_interval_over_seeds_is_students(freedom):
    values = np.random.default_rng(freedom).normal(3.0, 0.1, freedom + 1)
    n = len(values)
    error = math.sqrt(sum((x - values.mean()) ** 2 for x in values) / (n - 1) / n)
    low, high = t_interval(values)
    assert (high + low) / 2 == pytest.approx(values.mean(), rel=1e-12)
    assert (high - low) / 2 == pytest.approx(TABLE[freedom] * error, rel=1e-5)


def test_p_values_with_two_and_three_seeds_have_closed_forms():
    rng = np.random.default_rng(0)
    for _ in range(10):
        pair, triple = rng.normal(0.3, 1, 2), rng.normal(0.3, 1, 3)
        # One degree of freedom is Cauchy's distribution; two have this primitive.
        t = abs(pair.mean()) / (abs(pair[0] - pair[1]) / 2)
        assert p_value(pair) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
        t = abs(triple.mean()) / (triple.std(ddof=1) / math.sqrt(3))
        assert p_value(triple) == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-9)


def test_the_interval_excludes_zero_exactly_where_the_p_value_is_below_a_twentieth():
    rng = np.random.default_rng(1)
    for _ in range(200):
        differences = rng.normal(rng.normal(0, 2), 1, rng.integers(2, 6))
        low, high = t_interval(differences)
        assert (low > 0 or high < 0) == (p_value(differences) < 0.05)


def test_true_means_lie_in_nineteen_of_twenty_intervals():
    rng = np.random.default_rng(2)
    intervals = [t_interval(rng.normal(5, 2, 3)) for _ in range(4000)]
    covered = np.mean([low <= 5 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize("values", [[1.0], [1.0, math.inf], [math.nan, 1.0, 2.0]])
def test_what_cannot_be_known_is_none(values):
    assert t_interval(np.array(values)) is None
    assert p_value(np.array(values)) is None


def test_equal_differences_have_an_interval_of_no_width_and_no_p_value():
    assert t_interval(np.full(3, 0.5)) == [0.5, 0.5]
    assert p_value(np.full(3, 0.5)) is None


def test_an_estimate_by_hand():
    tokens = np.array([10.0, 30.0, 20.0])
    nats = np.array([[20.0, 90.0, 30.0], [22.0, 80.0, 36.0]])
    counts = resamples(3, 4000)
    found = estimate(nats, tokens, counts)
    by_seed = [140 / 60, 138 / 60]
    assert found["seeds"] == pytest.approx(by_seed)
    assert found["mean"] == pytest.approx(np.mean(by_seed))
    assert found["interval"] == pytest.approx(t_interval(np.array(by_seed)))
    # Every resample of three documents, weighted by how often it is drawn.
    pooled = nats.mean(axis=0)
    ratios = sorted(
        pooled[[i, j, k]].sum() / tokens[[i, j, k]].sum()
        for i in range(3)
        for j in range(3)
        for k in range(3)
    )
    # Widened as for three documents: by t(2) / z * sqrt(3 / 2) about the mean.
    mean, factor = pooled.sum() / tokens.sum(), TABLE[2] / 1.959964 * math.sqrt(3 / 2)
    expected = [mean + factor * (ratio - mean) for ratio in (ratios[0], ratios[-1])]
    assert found["document_interval"] == pytest.approx(expected, rel=1e-5)


def test_seeds_do_not_widen_the_interval_over_documents_nor_documents_that_over_seeds():
    tokens, counts = np.ones(8), resamples(8, 500)
    document = np.random.default_rng(3).gamma(3, size=8)
    seeds = np.array([[-0.2], [0.0], [0.2]])
    found = estimate(document[None] + seeds, tokens, counts)
    alone = estimate(document[None], tokens, counts)
    assert found["document_interval"] == pytest.approx(alone["document_interval"])
    assert alone["interval"] is None
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(TABLE[2] * 0.2 / math.sqrt(3), rel=1e-5)
