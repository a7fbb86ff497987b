"""Documents, and how a split that is missing is held out of the training documents.

A document is an iterable of pieces of its text, in order, that can be iterated again. So a file of
any size is one document without ever being in memory as a whole.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

Document = Iterable[str]
MayCut = Callable[[str, str], bool]

SPLITS = ("train", "valid", "test")
HELD_OUT_FRACTION = 0.05  # of the documents, for each split that is held out
PIECE_LENGTH = 1 << 12  # characters; BPE takes twice as long for pieces of 1 << 16
_CONTEXT = 128  # characters on either side of a cut that a tokenizer is asked about
_CUTS_TO_TRY = 8  # in a piece, before a longer one is taken


def is_blank(document: Document) -> bool:
    """Say whether a document holds nothing but white space.

    Args:
        document: Pieces of text; read only up to the first that is not blank.
    """
    return not any(piece.strip() for piece in document)


def bounded_pieces(document: Document, may_cut: MayCut | None) -> Iterator[str]:
    """Cut a document into pieces for a tokenizer, of `PIECE_LENGTH` characters where that may be.

    Cuts fall before white space that follows something else, where `may_cut` allows one. A piece
    in which it allows none becomes longer, up to the whole document.

    Args:
        document: Pieces of any lengths.
        may_cut: Says whether the text may be cut between some characters before and some after;
            None: it may anywhere.

    Yields:
        Non-empty pieces whose concatenation is the document.
    """
    rest, length = "", PIECE_LENGTH
    for piece in document:
        rest += piece
        start = 0
        while len(rest) - start > length + _CONTEXT:
            stop = _cut_before(rest, start, start + length, may_cut)
            if stop is None:
                length *= 2
                continue
            yield rest[start:stop]
            start, length = stop, PIECE_LENGTH
        rest = rest[start:]
    if rest:
        yield rest


def _cut_before(text: str, start: int, stop: int, may_cut: MayCut | None) -> int | None:
    """Return the last place in (start, stop] for a cut, None if none of the last few is one."""
    if may_cut is None:
        return stop
    places = (
        at for at in range(stop, start, -1) if text[at].isspace() and not text[at - 1].isspace()
    )
    for at in itertools.islice(places, _CUTS_TO_TRY):
        if may_cut(text[max(start, at - _CONTEXT) : at], text[at : at + _CONTEXT]):
            return at
    return None


def hold_out(
    read: Callable[[], Iterator[Document]], held_out: Sequence[str]
) -> Iterator[tuple[str, Document]]:
    """Split documents by a hash of their content, 5 % for each split that is held out.

    So a document is in one split only, copies of it are in the same one, and neither the order of
    the documents nor the names of their files matter. Two cases need more than the hash:

    - With fewer different documents than splits (a single input.txt), each one is cut into
      contiguous parts, train first: 90/5/5 % of its characters where two splits are held out.
    - Where the hash leaves a split empty (a few dozen documents), the documents are ranked by hash
      and each held-out split takes 5 % of them, at least one; the longest stays in train.

    Args:
        read: Starts a pass over the documents, none of them blank; called twice. The first pass
            only asks which case it is and ends as soon as every split has a document.
        held_out: The splits to take out of "train".

    Yields:
        (split, document) in the order of `read`.
    """
    lengths: dict[bytes, int] = {}
    empty = {"train", *held_out}
    for document in read():
        key, length = _digest(document)
        lengths[key] = length
        empty.discard(_split_by_hash(key, held_out))
        if not empty:
            break
    if empty and len(lengths) <= len(held_out):
        for document in read():
            yield from _cut(document, lengths[_digest(document)[0]], held_out)
        return
    by_rank = _splits_by_rank(lengths, held_out) if empty else None
    for document in read():
        key, _ = _digest(document)
        yield by_rank[key] if by_rank else _split_by_hash(key, held_out), document


def split_of(content: bytes, held_out: Sequence[str]) -> str:
    """Return "train" or the held-out split that a hash of `content` gives.

    Args:
        content: What identifies a document.
        held_out: The splits beside "train", 5 % each.
    """
    return _split_by_hash(hashlib.blake2b(content).digest(), held_out)


def _digest(document: Document) -> tuple[bytes, int]:
    """Return a hash of the text, however it is cut into pieces, and its number of characters."""
    content, length = hashlib.blake2b(), 0
    for piece in document:
        content.update(piece.encode())
        length += len(piece)
    return content.digest(), length


def _split_by_hash(key: bytes, held_out: Sequence[str]) -> str:
    position = int.from_bytes(key[:8], "big") / 2**64  # uniform in [0, 1)
    index = int(position / HELD_OUT_FRACTION)
    return held_out[index] if index < len(held_out) else "train"


def _splits_by_rank(lengths: dict[bytes, int], held_out: Sequence[str]) -> dict[bytes, str]:
    keys = sorted(lengths)
    longest = max(keys, key=lambda key: lengths[key])
    ranked = iter([key for key in keys if key != longest])
    share = max(1, int(HELD_OUT_FRACTION * len(keys)))
    splits = {longest: "train"}
    for split in held_out:
        splits.update((key, split) for key in itertools.islice(ranked, share))
    splits.update((key, "train") for key in ranked)
    return splits


def _cut(
    document: Document, length: int, held_out: Sequence[str]
) -> Iterator[tuple[str, Document]]:
    share = int(HELD_OUT_FRACTION * length)
    start = length - share * len(held_out)
    yield "train", Excerpt(document, 0, start)
    for split in held_out:
        excerpt = Excerpt(document, start, start + share)
        start += share
        if not is_blank(excerpt):
            yield split, excerpt


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The characters [start, stop) of a document, itself a document."""

    document: Document
    start: int
    stop: int

    def __iter__(self) -> Iterator[str]:
        position = 0
        for piece in self.document:
            if position >= self.stop:
                return
            part = piece[max(self.start - position, 0) : self.stop - position]
            if part:
                yield part
            position += len(piece)
