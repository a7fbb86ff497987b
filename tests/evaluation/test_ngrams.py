"""N-grams counted by hand, and properties of any probability."""

import collections

import numpy as np
import pytest

from alibi_jax.evaluation import ngrams
from alibi_jax.evaluation.ngrams import ngram_losses


def test_the_formula_by_hand():
    """Witten and Bell's estimates of 0 1 0 2 0 1 over three tokens, on paper."""
    losses, num_counted = ngram_losses(np.array([0, 1, 0, 2, 0, 1]), np.array([[0, 1, 0, 1, 1]]), 3)
    assert num_counted == 6
    # Unigrams: 3, 2 and 1 of 6, and 3 different ones, each mixed with 1/3.
    zero, one = 4 / 9, 1 / 3
    np.testing.assert_allclose(np.exp(-losses[1]), [[one, zero, one, one]])
    # After 0 came 1, 2, 1; after 1 came 0.
    one_after_0, zero_after_1, one_after_1 = (2 + 2 * one) / 5, (1 + zero) / 2, (0 + one) / 2
    np.testing.assert_allclose(
        np.exp(-losses[2]), [[one_after_0, zero_after_1, one_after_0, one_after_1]]
    )
    # The first target has one token before it; after 0 1 came 0, after 1 0 came 2; 0 1 ends it.
    np.testing.assert_allclose(
        np.exp(-losses[3]),
        [[one_after_0, (1 + zero_after_1) / 2, (0 + one_after_0) / 2, (0 + one_after_1) / 2]],
    )


def test_an_unseen_context_leaves_it_at_the_shorter_one():
    losses, _ = ngram_losses(np.array([0, 1, 0, 1, 0]), np.array([[2, 2, 1]]), 3)
    np.testing.assert_array_equal(losses[3], losses[1])


@pytest.mark.parametrize("vocab_size", [7, 268_000])
def test_every_context_has_a_probability_of_one(vocab_size):
    """Over all tokens that can follow, also where a trigram needs all 64 bits."""
    rng = np.random.default_rng(0)
    text = vocab_size - 1 - rng.integers(0, 6, 200)
    follows = np.concatenate([np.arange(vocab_size - 7, vocab_size), [0]])
    for context in (text[:2], text[50:52], np.array([0, text[0]])):
        rows = np.column_stack([np.tile(context, (len(follows), 1)), follows])
        losses, _ = ngram_losses(text, rows, vocab_size)
        for n in ngrams.NAMES:
            last = np.exp(-losses[n][:, -1])
            # Token 0 never occurs and stands for all others of the large vocabulary.
            assert last[:7].sum() + (vocab_size - 7) * last[7] == pytest.approx(1)


def test_numbers_of_a_large_text_are_those_of_a_dictionary():
    rng = np.random.default_rng(1)
    text, rows = rng.integers(0, 50, 5000), rng.integers(0, 50, (4, 20))
    losses, _ = ngram_losses(text, rows, 50)
    seen, followers = collections.Counter(), collections.defaultdict(set)
    for n in (1, 2, 3):
        for gram in zip(*(text[i:].tolist() for i in range(n)), strict=False):
            seen[gram] += 1
            followers[gram[:-1]].add(gram[-1])

    def probability(context, token):
        shorter = probability(context[1:], token) if context else 1 / 50
        kinds = len(followers[context])
        total = sum(seen[(*context, other)] for other in followers[context])
        return (seen[(*context, token)] + kinds * shorter) / (total + kinds) if kinds else shorter

    for n in (1, 2, 3):
        expected = [
            [probability(tuple(row[max(0, i - n + 1) : i]), row[i]) for i in range(1, len(row))]
            for row in rows.tolist()
        ]
        np.testing.assert_allclose(np.exp(-losses[n]), expected)


def test_of_a_long_text_pieces_from_all_over_it_count(monkeypatch):
    monkeypatch.setattr(ngrams, "_MOST_TOKENS", 40)
    monkeypatch.setattr(ngrams, "_PIECE", 10)
    text = np.repeat(np.arange(100), 10)  # piece i holds i alone
    losses, num_counted = ngram_losses(text, np.arange(100)[:, None].repeat(2, axis=1), 100)
    assert num_counted == 40
    (common,) = np.nonzero(losses[1][:, 0] < np.log(100))
    assert common.tolist() == [12, 37, 62, 87]


def test_what_no_64_bits_hold_is_not_counted():
    token = 3_000_000 - 1
    losses, _ = ngram_losses(np.full(9, token), np.full((1, 4), token), token + 1)
    assert list(losses) == [1, 2]
    np.testing.assert_allclose(np.exp(-losses[1]), (9 + 1 / 3e6) / 10)
