"""What short n-grams of the training text make of the held-out text: the floor of every verdict.

A model that learned next to nothing is as good at every length, and so would hold, use little
context and mislead. So the same targets are scored by the unigrams, bigrams and trigrams of the
training text with interpolated Witten-Bell smoothing, which has no parameter to set (Witten and
Bell, IEEE Transactions on Information Theory 37, 1991; as in Chen and Goodman, Computer Speech and
Language 13, 1999, section 2.4): where a context h of the last n - 1 tokens was followed c times by
w, C times in all and by T different tokens,

    p_n(w | h) = (c + T p_{n-1}(w | h without its first token)) / (C + T)

and p_0 is 1 / vocabulary. A context that never occurred, or that begins before the window, leaves
it at p_{n-1}.
"""

from typing import NamedTuple

import numpy as np

from alibi_jax.evaluation.windows import spread

NAMES = {1: "unigrams", 2: "bigrams", 3: "trigrams"}
_MOST_TOKENS = 1 << 24  # counted: ten seconds and a gigabyte of memory
_PIECE = 1 << 12  # tokens


class NgramLosses(NamedTuple):
    """Losses of the tokens of windows under the n-grams of a text."""

    by_order: dict[int, np.ndarray]  # nats of each token for n of `NAMES`, float64 [N, T]
    num_counted: int  # tokens of the text that were counted


def ngram_losses(training: np.ndarray, rows: np.ndarray, vocab_size: int) -> NgramLosses:
    """Score the tokens of windows by the n-grams of a text.

    Args:
        training: Token ids, int [M]. Of more than 2^24, pieces that are spread evenly count.
        rows: int [N, T + 1]; the first token of each row is context only.
        vocab_size: Beyond 2^21, where a trigram is no 64-bit number, there are no trigrams.
    """
    text = _sample(training).astype(np.int64)
    rows = rows.astype(np.int64)
    probability = np.full(rows[:, 1:].shape, 1 / vocab_size)
    losses = {}
    for n in (n for n in NAMES if vocab_size**n < 1 << 63):
        counted = _Counts(_numbers(text, n, vocab_size), vocab_size)
        # The first targets of a row have fewer than n - 1 tokens before them.
        later = probability[:, max(n - 2, 0) :]
        later[:] = counted.smoothed(_numbers(rows, n, vocab_size)[:, n == 1 :], later)
        losses[n] = -np.log(probability)
    return NgramLosses(losses, len(text))


def _sample(tokens: np.ndarray) -> np.ndarray:
    """All tokens, or of a long text as many as are counted, in pieces spread evenly over it."""
    if len(tokens) <= _MOST_TOKENS:
        return tokens
    pieces = tokens[: len(tokens) - len(tokens) % _PIECE].reshape(-1, _PIECE)
    return pieces[spread(len(pieces), _MOST_TOKENS // _PIECE)].reshape(-1)


def _numbers(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Write each n-gram of int64 [..., M] as one number, int64 [..., M - n + 1]."""
    length = tokens.shape[-1] - n + 1
    numbers = np.zeros((*tokens.shape[:-1], length), np.int64)
    for start in range(n):
        numbers *= vocab_size
        numbers += tokens[..., start : start + length]
    return numbers


class _Counts:
    """How often n-grams occur, and what follows their contexts."""

    def __init__(self, numbers: np.ndarray, vocab_size: int):
        self._vocab_size = vocab_size
        numbers = np.sort(numbers)
        starts = _starts(numbers)
        self._ngrams, self._counts = numbers[starts], np.diff(starts, append=len(numbers))
        contexts = self._ngrams // vocab_size
        starts = _starts(contexts)
        self._contexts = contexts[starts]
        self._totals = np.add.reduceat(self._counts, starts)
        self._followers = np.diff(starts, append=len(contexts))

    def smoothed(self, numbers: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Interpolate the frequencies of n-grams with the probabilities of shorter ones."""
        contexts = numbers // self._vocab_size
        count = _look_up(self._ngrams, self._counts, numbers)
        total = _look_up(self._contexts, self._totals, contexts)
        followers = _look_up(self._contexts, self._followers, contexts)
        return np.where(
            total > 0, (count + followers * shorter) / np.maximum(total + followers, 1), shorter
        )


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each different value begins."""
    return np.flatnonzero(np.diff(ordered, prepend=-1))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of keys in ascending order; 0 for what is not among them."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
