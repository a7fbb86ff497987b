"""The share of a text that stands in another, with copies whose place is known."""

import numpy as np
import pytest

from alibi_jax.evaluation import overlap
from alibi_jax.evaluation.overlap import training_overlap


def texts(seed=0, vocab_size=50_000):
    """A training text and windows that share no token."""
    rng = np.random.default_rng(seed)
    training = rng.integers(0, vocab_size, 5000)
    return training, rng.integers(vocab_size, 2 * vocab_size, (4, 101))


@pytest.mark.parametrize(("copied", "seen"), [(12, 0), (13, 13), (40, 40)])
@pytest.mark.parametrize("at_once", [1 << 20, 100])
def test_thirteen_tokens_in_a_row_count_and_twelve_do_not(monkeypatch, copied, seen, at_once):
    monkeypatch.setattr(overlap, "_AT_ONCE", at_once)  # the copy crosses the edge of a piece
    training, rows = texts()
    rows[2, 30 : 30 + copied] = training[580 : 580 + copied]
    found = training_overlap(training, rows, bytes_per_token=5.0)
    assert found == {"ngram": 13, "share": seen / 400, "num_searched": 5000}


def test_windows_that_are_in_the_training_text_are_seen_whole():
    training, _ = texts()
    rows = np.lib.stride_tricks.sliding_window_view(training, 101)[::50]
    assert training_overlap(training, rows, 5.0)["share"] == 1


@pytest.mark.parametrize(
    ("bytes_per_token", "ngram"), [(1.0, 50), (2.0, 25), (3.5, 15), (4.0, 13), (6.0, 13)]
)
def test_short_tokens_make_longer_n_grams(bytes_per_token, ngram):
    training, rows = texts()
    rows[0, 10 : 10 + ngram - 1] = training[: ngram - 1]
    rows[1, 10 : 10 + ngram] = training[-ngram:]
    found = training_overlap(training, rows, bytes_per_token)
    assert (found["ngram"], found["share"]) == (ngram, ngram / 400)


@pytest.mark.parametrize("length", [2, 12, 13])
def test_texts_shorter_than_an_n_gram_share_nothing(length):
    training, rows = texts()
    assert training_overlap(training, training[:length][None], 5.0)["share"] == (length == 13)
    assert training_overlap(training[:length], rows, 5.0)["share"] == 0


def test_of_a_long_text_the_beginning_is_searched(monkeypatch):
    monkeypatch.setattr(overlap, "_MOST_TOKENS", 1000)
    training, rows = texts()
    rows[0, 1:51], rows[1, 1:51] = training[900:950], training[990:1040]
    found = training_overlap(training, rows, 5.0)
    assert found == {"ngram": 13, "share": 50 / 400, "num_searched": 1000}


def test_numbers_of_n_grams_do_not_repeat():
    """All 7^6 rows of 6 tokens differ, in order too, and so do their numbers."""
    grams = np.stack(np.meshgrid(*[np.arange(7)] * 6), axis=-1).reshape(-1, 6)
    assert len(np.unique(overlap._hashes(grams, 6))) == 7**6
