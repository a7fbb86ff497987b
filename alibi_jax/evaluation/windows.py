"""The held-out tokens that every protocol scores: windows spread over documents.

A document that is the copy of another, token by token, is left out: it says nothing new, and would
count as an independent one.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from alibi_jax.errors import UserError

_MIN_UNITS = 2  # fewer documents give no interval


class TokenizedDocuments(Protocol):
    """Tokenized documents, one after the other (`alibi_jax.data.corpus.TokenizedSplit`)."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, int [total]."""

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the source text for which each token stands, int [total]."""

    @property
    def offsets(self) -> np.ndarray:
        """Where documents start, and the end of the last, int64 [num_documents + 1]."""


@dataclass(frozen=True)
class Windows:
    """The held-out tokens that every length scores.

    Attributes:
        tokens: int32 [N, longest + 1]; the first of each row is context only.
        document: int64 [N], which unit a window comes from; the bootstrap resamples these.
        unit: What such a unit is: "document", or "block" of the concatenated stream.
        token_bytes: int64 [N, longest + 1], UTF-8 bytes of the source text for which each token
            stands. Bits per byte of any targets are their nats, over ln 2, over their own bytes.
        copies: How many documents that could give windows are left out as copies of others.
    """

    tokens: np.ndarray
    document: np.ndarray
    unit: str
    token_bytes: np.ndarray
    copies: int = 0

    @property
    def num_targets(self) -> int:
        """Number of tokens that are scored."""
        return self.tokens[:, 1:].size

    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the source text per target."""
        return float(self.token_bytes[:, 1:].mean())

    def unknown_bytes(self, unknown: int | None) -> float:
        """Fraction of the targets' bytes for which a token stands that is not in the vocabulary.

        Args:
            unknown: `Tokenizer.unknown`.
        """
        num_bytes = self.token_bytes[:, 1:]
        return float(num_bytes[self.tokens[:, 1:] == unknown].sum() / max(num_bytes.sum(), 1))

    @property
    def per_document(self) -> list[int]:
        """Number of windows of each document, in the order of `bootstrap.document_sums`."""
        return np.unique(self.document, return_counts=True)[1].tolist()


def supported_lengths(
    split: TokenizedDocuments, lengths: Sequence[int], packing: str
) -> tuple[tuple[int, ...], str | None]:
    """Leave out the lengths that the held-out documents are too short for.

    A length stays if two documents (or pieces of the stream) hold it, so that it has an interval;
    where even the first length has only one, one is enough.

    Args:
        split: Held-out documents.
        lengths: Tokens per window, shortest first.
        packing: "documents": a window lies inside one document; "stream": it may cross documents.

    Returns:
        The lengths that stay, and a line that says which do not and why (None if all stay).

    Raises:
        UserError: If not even the first length is possible.
    """
    spans = _spans(split, packing, _copies(split))
    units = [_num_units(spans, length, packing) for length in lengths]
    longest = max(spans[:, 1] - spans[:, 0], default=0)
    text = "the held-out text" if packing == "stream" else "the longest held-out document"
    if units[0] == 0:
        raise UserError(
            f"evaluation needs {lengths[0] + 1} tokens for one window of {lengths[0]}, but {text} "
            f"has {longest}; give longer held-out text or train at a shorter length"
        )
    needed = min(_MIN_UNITS, units[0])
    kept = tuple(length for length, count in zip(lengths, units, strict=True) if count >= needed)
    if len(kept) == len(lengths):
        return kept, None
    left_out = ", ".join(str(length) for length in lengths[len(kept) :])
    unit = _unit(packing) + ("s" if needed > 1 else "")
    return kept, (
        f"evaluation lengths left out: {left_out} (each needs {needed} held-out {unit} of more "
        f"than that many tokens; {text} has {longest})"
    )


def longest_windows(
    split: TokenizedDocuments, *, longest: int, num_windows: int, packing: str
) -> Windows:
    """Take windows of `longest` targets, spread evenly over the held-out text.

    With packing "documents" every document that is long enough gives one window before any gives
    a second, and the windows of a document are spread evenly over it (a single one comes from its
    middle: books begin with title pages). No two windows score the same token, and nothing is
    random.

    Args:
        split: Held-out documents.
        longest: Targets per window.
        num_windows: Windows wanted; fewer come back if the text holds no more.
        packing: "documents": a window lies inside one document; "stream": windows are pieces of
            the concatenated documents, and blocks of consecutive ones are the units.

    Returns:
        The windows, in the order of the text.

    Raises:
        UserError: If the text does not hold a single window.
    """
    copied = _copies(split)
    spans = _spans(split, packing, copied)
    capacity = _capacity(spans, longest)
    share = _shares(capacity, num_windows)
    if not share.any():
        raise UserError(
            f"no held-out {_unit(packing)} has the {longest + 1} tokens of an evaluation window of "
            f"{longest}; give longer held-out text or shorten config.evaluation.multiples"
        )
    document = np.repeat(np.arange(len(share)), share)
    starts = np.concatenate(
        [spans[i, 0] + longest * spread(capacity[i], share[i]) for i in np.flatnonzero(share)]
    )

    def rows(of: np.ndarray, dtype: type) -> np.ndarray:
        return np.stack([of[start : start + longest + 1] for start in starts]).astype(dtype)

    tokens, token_bytes = rows(split.tokens, np.int32), rows(split.token_bytes, np.int64)
    needed = longest + 1 if packing == "documents" else 0
    copies = int((copied & (np.diff(split.offsets) >= needed)).sum())
    unit = "document"
    if packing == "stream":
        document, unit = _blocks(len(starts)), "block"
    return Windows(tokens, document, unit, token_bytes, copies)


def _blocks(num_pieces: int) -> np.ndarray:
    """Number blocks of consecutive pieces of a stream, int64 [num_pieces].

    Neighbours may share a document, and a stream need not say where documents end (WikiText is one
    file). Blocks of the cube root of so many pieces are resampled in place of single ones, as is
    usual for a series whose neighbours are alike (Carlstein, Annals of Statistics 14, 1986; Hall,
    Horowitz and Jing, Biometrika 82, 1995).
    """
    return np.arange(num_pieces) // math.floor(np.cbrt(num_pieces))


def _unit(packing: str) -> str:
    return {"documents": "document", "stream": "piece"}[packing]


def _copies(split: TokenizedDocuments) -> np.ndarray:
    """Which documents have the tokens of one before them, bool [num_documents]."""
    seen: set[bytes] = set()
    copies = []
    for start, stop in itertools.pairwise(split.offsets):
        digest = hashlib.blake2b(split.tokens[start:stop].tobytes()).digest()
        copies.append(digest in seen)
        seen.add(digest)
    return np.array(copies, bool)


def _spans(split: TokenizedDocuments, packing: str, copied: np.ndarray) -> np.ndarray:
    """Starts and ends that no window crosses, int [n, 2]: documents, or the stream between copies.

    Without a copy, the stream is one span.
    """
    documents = np.stack([split.offsets[:-1], split.offsets[1:]], axis=1)[~copied]
    if packing == "documents" or not len(documents):
        return documents
    starts = np.flatnonzero(documents[1:, 0] != documents[:-1, 1]) + 1
    runs = np.split(documents, starts)
    return np.array([(run[0, 0], run[-1, 1]) for run in runs])


def _capacity(spans: np.ndarray, length: int) -> np.ndarray:
    """Windows of `length` targets that each span holds, int [n]."""
    return np.maximum(spans[:, 1] - spans[:, 0] - 1, 0) // length


def _num_units(spans: np.ndarray, length: int, packing: str) -> int:
    """Units with a window of this length: documents, or pieces of the stream."""
    capacity = _capacity(spans, length)
    return int(capacity.sum() if packing == "stream" else np.count_nonzero(capacity))


def _shares(capacity: np.ndarray, num_windows: int) -> np.ndarray:
    """Windows to take from each document: one from each, then a second from each, and so on."""
    share = np.zeros_like(capacity)
    while num_windows > 0 and (open_documents := np.flatnonzero(capacity > share)).size:
        count = min(num_windows, len(open_documents))
        share[open_documents[spread(len(open_documents), count)]] += 1
        num_windows -= count
    return share


def spread(total: int, count: int) -> np.ndarray:
    """`count` of the indices 0..total-1, evenly spaced and centred, int64 [count]."""
    return (2 * np.arange(count) + 1) * total // (2 * count)
