"""How much of the held-out text stands in the training text as well, word for word.

A token of the held-out windows counts as seen where an n-gram that holds it occurs in the training
text (Touvron et al., Llama 2, 2023, appendix A.6, https://arxiv.org/abs/2307.09288). n is 13
tokens, as of GPT-3's 13 words (Brown et al., 2020, appendix C, https://arxiv.org/abs/2005.14165),
or as many as it takes to span 50 bytes where tokens are short (GPT-4's test is of 50 characters;
OpenAI, 2023, appendix C, https://arxiv.org/abs/2303.08774): most runs of 13 bytes are in any text.
"""

import math
from typing import Any

import numpy as np

LARGE = 0.2  # Llama 2 calls a text clean that has less
_LEAST_TOKENS, _LEAST_BYTES = 13, 50
_MOST_TOKENS = 1 << 26  # searched, from the start of the training text: about twenty seconds
_AT_ONCE = 1 << 20  # bounds memory
_TABLE_BITS = 24


def training_overlap(
    training: np.ndarray, rows: np.ndarray, bytes_per_token: float
) -> dict[str, Any]:
    """Find the share of windows that occurs in the training text.

    Args:
        training: Token ids, int [M], of which the first 2^26 are searched.
        rows: int [N, T + 1]; the first token of each is not scored.
        bytes_per_token: Of these texts.

    Returns:
        "ngram", the tokens of an n-gram; "share" of the tokens that are scored, 0 to 1; and
        "num_searched" tokens of training text. Windows shorter than an n-gram have a share of 0.
    """
    n = max(_LEAST_TOKENS, math.ceil(_LEAST_BYTES / bytes_per_token))
    wanted = _hashes(rows, n)
    training = training[:_MOST_TOKENS]
    # Most n-grams are told apart by a few of their bits; only the others are looked up.
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[_slot(wanted)] = True
    candidates = []
    for start in range(0, max(len(training) - n + 1, 0), _AT_ONCE):
        hashes = _hashes(training[start : start + _AT_ONCE + n - 1], n)
        candidates.append(np.unique(hashes[table[_slot(hashes)]]))
    found = np.isin(wanted, np.concatenate([*candidates, np.zeros(0, np.uint64)]))
    # The n-gram that starts at i covers tokens i to i + n - 1.
    seen = np.zeros(rows.shape, bool)
    for offset in range(n if found.size else 0):
        seen[:, offset : offset + found.shape[1]] |= found
    return {"ngram": n, "share": float(seen[:, 1:].mean()), "num_searched": len(training)}


def _hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit number for each n-gram of [..., M], uint64 [..., M - n + 1].

    That of a long n-gram is mixed from those of two shorter ones that overlap, so it takes log n
    steps. That any two of 2^26 tokens and of a million agree by chance has a probability of 4e-6.
    """
    hashes, size = tokens.astype(np.uint64), 1
    while size < n and hashes.shape[-1]:
        step = min(size, n - size)
        count = max(hashes.shape[-1] - step, 0)
        hashes = _mixed(_mixed(hashes[..., :count]) + hashes[..., step : step + count])
        size += step
    return hashes


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def _slot(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
