"""Intervals cover what they should, no more and no less."""

import math

import numpy as np
import pytest

from alibi_jax.evaluation.bootstrap import (
    document_sums,
    interval,
    interval_of_a_length,
    resamples,
    widened,
    wilson,
)
from alibi_jax.evaluation.judgement import held_to, used_to

# Student's t: 97.5th percentiles of any printed table, by degrees of freedom.
STUDENT = {1: 12.7062, 3: 3.18245, 5: 2.57058, 7: 2.36462, 9: 2.26216}


def factor(num_documents):
    """How much wider an interval has to be, from the printed tables."""
    return STUDENT[num_documents - 1] / 1.959964 * math.sqrt(num_documents / (num_documents - 1))


def test_document_sums_add_the_windows_of_a_document():
    sums = document_sums(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([7, 2, 7]))
    np.testing.assert_array_equal(sums, [7, 14])


def test_resamples_draw_as_many_documents_as_there_are():
    counts = resamples(5, 300)
    assert counts.shape == (300, 5)
    np.testing.assert_array_equal(counts.sum(axis=1), 5)
    np.testing.assert_array_equal(counts, resamples(5, 300))


def test_interval_equals_a_plain_loop_over_drawn_documents():
    rng = np.random.default_rng(0)
    losses, tokens = rng.gamma(3, size=6), rng.integers(1, 9, 6).astype(np.float64)
    counts = resamples(6, 200)
    ratios = []
    for row in counts:
        drawn = np.repeat(np.arange(6), row)
        ratios.append(losses[drawn].sum() / tokens[drawn].sum())
    point = losses.sum() / tokens.sum()
    np.testing.assert_allclose(
        interval(losses, tokens, counts),
        point + factor(6) * (np.percentile(ratios, [2.5, 97.5]) - point),
        rtol=1e-5,
    )


@pytest.mark.parametrize("num_documents", [2, 4, 10])
def test_resamples_are_widened_as_students_t_says(num_documents):
    drawn = np.array([[1.0, 5.0], [4.0, 5.0]])
    expected = [2 - factor(num_documents), 2 + 2 * factor(num_documents)]
    found = widened(np.array([2.0, np.inf]), drawn, num_documents)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    np.testing.assert_array_equal(found[:, 1], 5)  # nothing to widen about


@pytest.mark.parametrize("num_documents", [4, 10])
def test_few_documents_cover_the_truth_as_often_as_many(num_documents):
    rng = np.random.default_rng(4)
    tokens, counts = np.ones(num_documents), resamples(num_documents, 1000)
    covered = unwidened = 0
    for values in rng.normal(2, 0.3, (2000, num_documents)):
        low, high = interval(values, tokens, counts)
        covered += low <= 2 <= high
        low, high = np.percentile(counts @ values / num_documents, [2.5, 97.5])
        unwidened += low <= 2 <= high
    assert 0.93 <= covered / 2000 <= 0.97
    assert unwidened < covered - 60


@pytest.mark.parametrize("num_documents", [4, 10])
def test_a_length_is_the_longest_in_few_documents_as_rarely_as_it_should(num_documents):
    """The truth lies on the line between two lengths: one of them is sure one time in twenty."""
    rng = np.random.default_rng(5)
    counts = resamples(num_documents, 400)
    sure = {"below": 0, "above": 0}
    for _ in range(1000):
        level = rng.normal(2, 0.3, num_documents)
        change = level * 0.01 + rng.normal(0, 0.02, num_documents)
        totals = np.stack([level, level + change])
        low, high = interval_of_a_length(lambda drawn: held_to(drawn, (64, 128)), totals, counts)
        sure["below"] += high == 64
        sure["above"] += low == 128
    assert 0.03 <= sum(sure.values()) / 1000 <= 0.075
    assert min(sure.values()) > 10


def simulate(rng, num_documents=30):
    """Nats at two lengths: documents differ by 0.3, windows by 0.1; the change is 0.02 on average.

    Documents have 1 to 4 windows whatever their loss, so the truth of a ratio is the plain mean.
    """
    document = np.repeat(np.arange(num_documents), rng.integers(1, 5, num_documents))
    level = 2 + rng.normal(0, 0.3, num_documents)[document] + rng.normal(0, 0.1, len(document))
    change = 0.02 + rng.normal(0, 0.01, num_documents)[document]
    return level[:, None], change[:, None], document


def test_intervals_cover_the_truth_and_pairs_are_tighter():
    rng = np.random.default_rng(1)
    level_hits = change_hits = naive_hits = 0
    for _ in range(200):
        level, change, document = simulate(rng)
        tokens = document_sums(np.ones_like(level), document)
        counts = resamples(30, 400)
        low, high = interval(document_sums(level, document), tokens, counts)
        change_low, change_high = interval(document_sums(change, document), tokens, counts)
        level_hits += low <= 2 <= high
        change_hits += change_low <= 0.02 <= change_high
        assert change_high - change_low < (high - low) / 10
        # Resampling windows as though they were independent is the mistake to avoid.
        windows = np.arange(len(document))
        low, high = interval(
            document_sums(level, windows),
            document_sums(np.ones_like(level), windows),
            resamples(len(windows), 400),
        )
        naive_hits += low <= 2 <= high
    assert 176 <= level_hits <= 198
    assert 176 <= change_hits <= 198
    assert naive_hits < level_hits - 10


def test_one_document_has_no_interval():
    assert interval(np.array([1.0]), np.array([2.0]), resamples(1, 100)) is None


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_totals_that_are_not_finite_have_no_interval(bad):
    counts = resamples(3, 100)
    assert interval(np.array([1.0, bad, 1.0]), np.ones(3), counts) is None
    assert interval(np.ones(3), np.zeros(3), counts) is None


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (0, 3)])
def test_wilson_of_all_or_none_counts_trials(hits, trials):
    """The closed form where the rate is 0 or 1: z^2 / (n + z^2) from the end."""
    bound = 1.959964**2 / (trials + 1.959964**2)
    low, high = wilson(np.full((trials, 7), hits > 0))
    expected = (1 - bound, 1) if hits else (0, bound)
    np.testing.assert_allclose((low, high), expected, atol=1e-12)


def test_wilson_equals_the_roots_of_its_quadratic():
    """It holds the rates p with |rate - p| <= z sqrt(p (1 - p) / n)."""
    hits = np.zeros((20, 1), bool)
    hits[:7] = True
    low, high = wilson(hits)
    for p in (low, high):
        # One hit a trial: the spread of the trials says that there are 19 independent ones, and
        # they are at least the 20 trials.
        assert (0.35 - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 20, rel=1e-9)


def test_wilson_covers_the_truth_where_the_hits_of_a_trial_are_alike():
    rng = np.random.default_rng(2)
    covered = naive = independent = 0
    for _ in range(300):
        rate = rng.beta(1, 1.5, (20, 1))  # of a trial; 0.4 on average
        hits = rng.random((20, 8)) < rate
        low, high = wilson(hits)
        covered += low <= 0.4 <= high
        low, high = wilson(hits.reshape(-1, 1))  # as though all hits were independent
        naive += low <= 0.4 <= high
        low, high = wilson(rng.random((20, 8)) < 0.4)
        independent += high - low
    assert 270 <= covered <= 297
    assert naive < covered - 30
    assert independent / 300 < 0.2  # of 160 independent hits it is 0.15


def test_interval_of_a_length_finds_it_in_every_resample():
    rng = np.random.default_rng(3)
    totals = rng.normal([[2.0], [2.02], [2.04]], 0.05, (3, 8))
    counts = resamples(8, 300)

    def below_two_percent(drawn):
        return np.array([64, 128, 256])[(drawn <= 1.02 * drawn[:, :1]).cumprod(axis=1).sum(1) - 1]

    found, point = [], totals.sum(axis=1)
    for row in counts:
        nats = [sum(np.repeat(total, row)) for total in totals]
        nats = point * (nats / point) ** factor(8)
        found.append(64 if nats[1] > 1.02 * nats[0] else 128 if nats[2] > 1.02 * nats[0] else 256)
    low, high = interval_of_a_length(below_two_percent, totals, counts)
    assert (low, high) == (64, 256)
    ordered = sorted(found)
    assert low == ordered[7] and high == ordered[292]  # of 300
    assert interval_of_a_length(below_two_percent, totals[:, :1], resamples(1, 10)) is None


def test_a_document_with_an_infinite_loss_matters_only_where_it_is_drawn():
    counts = np.array([[2, 0], [1, 1], [0, 2]])
    seen = []

    def note(drawn):
        seen.append(drawn)
        return np.zeros(len(drawn))

    interval_of_a_length(note, np.array([[1.0, np.inf]]), counts)
    np.testing.assert_allclose(seen[0][:, 0], [2, np.inf, np.inf])


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_what_no_document_changes_has_a_sure_length_however_much_they_differ(scale):
    """Two documents, of which one is all but empty: the ratio of losses is that of both."""
    totals = scale * np.array([[9.0, 0.09], [8.0, 0.08], [8.0, 0.08]])
    found = interval_of_a_length(
        lambda drawn: used_to(drawn, (32, 64, 128)), totals, resamples(2, 100)
    )
    assert found == ([64, 64] if scale else [32, 32])
