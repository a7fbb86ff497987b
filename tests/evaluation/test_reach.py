"""Quantiles of attention by distance, against closed forms."""

import math

import numpy as np
import pytest

from alibi_jax.evaluation import Windows
from alibi_jax.evaluation.bootstrap import resamples
from alibi_jax.evaluation.reach import (
    QUANTILES,
    attention_mass,
    mass_edges,
    nearest_keys,
    slope_keys,
)


@pytest.mark.parametrize("slope", [1.0, 0.5, 2**-4, 2**-8])
def test_slope_keys_hold_just_enough(slope):
    """The nearest n of the geometric distribution hold 1 - exp(-slope n)."""
    for p in QUANTILES:
        keys = slope_keys(slope, p, 1 << 14, sink=False)
        assert 1 - math.exp(-slope * keys) >= p > 1 - math.exp(-slope * (keys - 1))


def test_slope_keys_are_never_more_than_there_are():
    assert slope_keys(2**-8, 0.99, 100, sink=False) == 99
    for p in QUANTILES:
        assert slope_keys(1e-12, p, 1000, sink=False) == 1000 * p


def test_keys_have_intervals_as_wide_as_few_documents_need():
    """Half the attention of a head is on keys that differ from text to text."""
    share = np.array([0.5, 0.6, 0.7, 0.8])
    mass = np.stack([share, 1 - share], axis=1)  # at distances [0, 8) and [8, 16)
    tokens = np.zeros((4, 17), np.int32)
    windows = Windows(tokens, np.arange(4), "document", np.ones_like(tokens))
    found = attention_mass(
        lambda rows, edges, count: np.concatenate(
            [np.zeros((4, len(edges) - 1)), mass], axis=1, dtype=np.float32
        )[None, :, None],
        windows,
        16,
        num_queries=1,
        num_bootstrap=500,
        slopes=None,
        sink=False,
        tokens_per_batch=1000,
        progress=lambda count: None,
    )
    head = found["heads"][0]
    edge = mass_edges(16)[-2:]
    shares = resamples(4, 500) @ share / 4
    keys = edge[0] + (edge[1] - edge[0]) * 0.5 / shares  # of half the attention
    point = edge[0] + (edge[1] - edge[0]) * 0.5 / share.mean()
    assert head["keys"][0] == pytest.approx(point, rel=1e-5)
    # Student's t(3) is 3.18245.
    factor = 3.18245 / 1.959964 * math.sqrt(4 / 3)
    expected = point + factor * (np.percentile(keys, [2.5, 97.5]) - point)
    assert head["intervals"][0] == pytest.approx(np.clip(expected, 0, 16), rel=1e-4)


def test_edges_rise_below_the_length():
    for length in (2, 3, 64, 1000, 4096):
        edges = mass_edges(length)
        assert edges[0] == 1 and edges[-1] < length
        assert (np.diff(edges) > 0).all()
    assert mass_edges(64)[:9] == (1, 2, 3, 4, 5, 6, 7, 8, 10)


def test_equal_attention_needs_that_share_of_keys():
    edges = mass_edges(512)
    mass = np.diff([0, *edges, 512]) / 512
    np.testing.assert_allclose(
        nearest_keys(mass, edges, 512), [512 * p for p in QUANTILES], rtol=1e-12
    )


def test_totals_need_not_be_one():
    edges = (1, 2, 4)
    mass = np.array([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    found = nearest_keys(mass, edges, 8)
    np.testing.assert_allclose(found, [[1.0, 1.8, 1.98], [6.0, 7.6, 7.96]])
