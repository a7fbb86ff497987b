"""Quantiles of attention by distance, against closed forms."""

import math

import numpy as np
import pytest

from alibi_jax.evaluation.reach import QUANTILES, mass_edges, nearest_keys, slope_keys


@pytest.mark.parametrize("slope", [1.0, 0.5, 2**-4, 2**-8])
def test_slope_keys_hold_just_enough(slope):
    """The nearest n of the geometric distribution hold 1 - exp(-slope n)."""
    for p in QUANTILES:
        keys = slope_keys(slope, p)
        assert 1 - math.exp(-slope * keys) >= p > 1 - math.exp(-slope * (keys - 1))


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
