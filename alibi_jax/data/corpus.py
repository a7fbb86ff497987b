"""A tokenized corpus: three splits of documents, cached on disk and mapped into memory."""

import array
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from alibi_jax.data.config import DataConfig, trained_tokenizer
from alibi_jax.data.documents import PIECE_LENGTH, SPLITS, bounded_pieces
from alibi_jax.data.sources import Source, open_source
from alibi_jax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer_file,
    train_bpe,
    train_words,
)
from alibi_jax.errors import UserError
from alibi_jax.files import given_path

FORMAT = 1  # of how text becomes tokens; part of what identifies a corpus, and so of every run
_LAYOUT = 2  # of the cached files
_WIDE = np.dtype(np.uint32)  # of bytes per token, while their largest is not known
_AT_ONCE = 1 << 20  # characters tokenized at once, or one piece: about 100 bytes of memory each
_LONGEST = 2 * PIECE_LENGTH  # characters: a word of more is no word, and merging in it is slow

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """The documents of one split, one after the other.

    Every document stands as separator, its tokens, separator: so its first token is predicted from
    something and its end is learned.
    """

    tokens: np.ndarray  # uint16 or uint32 [N], mapped from disk
    # uint8, uint16 or uint32 [N], mapped: UTF-8 bytes of the text for which each token stands. A
    # token stands for all from the end of the one before: so for the white space before a word, and
    # the separator after a document for what is left at its end, mostly nothing.
    token_bytes: np.ndarray
    offsets: np.ndarray  # int64 [num_documents + 1]: document i is tokens[offsets[i]:offsets[i+1]]
    num_bytes: int  # UTF-8 bytes of the text, the sum of token_bytes

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of a document, both separators included.

        Args:
            index: From 0 to num_documents - 1.

        Returns:
            uint16 or uint32 [n], not copied.
        """
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The three splits and what they were tokenized with."""

    train: TokenizedSplit
    valid: TokenizedSplit
    test: TokenizedSplit
    tokenizer: Tokenizer
    fingerprint: str  # identifies every token of every split


def load_corpus(config: DataConfig) -> Corpus:
    """Load a corpus, tokenizing it (progress on stderr) unless the cache holds its tokens.

    Several processes may do this at once: each writes for itself, the first to finish is kept.

    Args:
        config: What the user asked for.

    Raises:
        UserError: A value, a file or a document that cannot work, in one line.
    """
    config.validate()
    source = open_source(config.source, config.text_field)
    cache = _cache_dir(config)
    tokenizer = _load_tokenizer(config, source, cache)
    fingerprint = _key(source.fingerprint, tokenizer.fingerprint)
    directory = cache / "tokens" / _key(fingerprint, _LAYOUT)
    splits = _read(directory)
    if splits is None:
        if directory.exists():
            _remove_damaged(directory)
        with _written_whole(directory) as unfinished:
            _tokenize(source, tokenizer, unfinished)
        splits = _read(directory)
        if splits is None:
            raise UserError(f"config.data.cache_dir: {directory} cannot be read: remove it")
    return Corpus(**splits, tokenizer=tokenizer, fingerprint=fingerprint)


def _cache_dir(config: DataConfig) -> pathlib.Path:
    if config.cache_dir is not None:
        return given_path("config.data.cache_dir", config.cache_dir)
    if home := os.environ.get("XDG_CACHE_HOME"):
        return given_path("XDG_CACHE_HOME", home) / "alibi_jax"
    return given_path("config.data.cache_dir", "~/.cache") / "alibi_jax"


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def _load_tokenizer(config: DataConfig, source: Source, cache: pathlib.Path) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    trained = trained_tokenizer(config.tokenizer)
    if trained is None:
        return load_tokenizer_file(given_path("config.data.tokenizer", config.tokenizer))
    directory = cache / "tokenizers" / _key(source.fingerprint, *trained, _LAYOUT)
    path = directory / "tokenizer.json"
    if path.is_file():
        with contextlib.suppress(UserError):  # damaged: train it again
            return load_tokenizer_file(path)
        _remove_damaged(directory)
    texts = (
        piece[start : start + _LONGEST]
        for split, document in source.read()
        if split == "train"
        for piece in bounded_pieces(document, lambda before, after: True)
        for start in range(0, len(piece), _LONGEST)
    )
    with _written_whole(directory) as unfinished:
        kind, vocab_size = trained
        train = {"bpe": train_bpe, "words": train_words}[kind]
        train(texts, vocab_size, unfinished / path.name)
    tokenizer = load_tokenizer_file(path)
    if tokenizer.vocab_size < vocab_size:
        _log.warning("%s: the text gives %d tokens only", config.tokenizer, tokenizer.vocab_size)
    return tokenizer


@contextlib.contextmanager
def _written_whole(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give an empty directory to fill, which takes its name only once it is complete."""
    unfinished = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory.parent))
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's own mode would hide it from other users of the cache
        try:
            unfinished.rename(directory)
        except OSError as error:  # another process was faster, with the very same content
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    except BrokenPipeError:  # of the screen that shows the progress
        raise
    except OSError as error:
        raise UserError(
            f"cache_dir: cannot write {directory.parent} ({error.strerror or error}); "
            "set cache_dir to a folder that can be written and has room"
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _remove_damaged(directory: pathlib.Path) -> None:
    _log.warning("%s is damaged and is made again", directory)
    shutil.rmtree(directory, ignore_errors=True)


def _tokenize(source: Source, tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Write the tokens of every split of a source, and meta.json that says what must be there."""
    import tqdm

    with (
        contextlib.ExitStack() as files,
        tqdm.tqdm(
            desc=f"tokenizing {source.name}", unit="B", unit_scale=True, disable=None
        ) as progress,
    ):
        writers = {split: _SplitWriter(directory, split, tokenizer, files) for split in SPLITS}
        pieces = (
            (split, piece, number == 0)
            for split, document in source.read()
            for number, piece in enumerate(bounded_pieces(document, tokenizer.may_cut))
        )
        for batch in _batches(pieces):
            encoded = tokenizer.encode_with_ends([piece for _, piece, _ in batch])
            for (split, piece, is_first), (ids, ends) in zip(batch, encoded, strict=True):
                num_bytes = len(piece.encode())
                writers[split].append(ids, ends, num_bytes, is_first)
                progress.update(num_bytes)
            progress.set_postfix_str(
                ", ".join(f"{split} {w.num_bytes / 1e6:.1f} MB" for split, w in writers.items()),
                refresh=False,
            )
        meta = {split: writer.finish() for split, writer in writers.items()}
    for split, writer in writers.items():
        if not writer.num_bytes:
            raise UserError(
                f"source {source.name!r}: no text is left for the split {split!r}; "
                "give more text, or files for it"
            )
        np.save(directory / f"{split}.offsets.npy", np.array(writer.offsets, np.int64))
        _narrow(directory / f"{split}.bytes", meta[split]["bytes_dtype"])
    (directory / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _batches(pieces: Iterator[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    """Yield pieces, each with its split and whether it is a document's first, a few at a time."""
    batch, length = [], 0
    for entry in pieces:
        batch.append(entry)
        length += len(entry[1])
        if length >= _AT_ONCE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(
        self, directory: pathlib.Path, split: str, tokenizer: Tokenizer, files: contextlib.ExitStack
    ) -> None:
        self.num_bytes = 0
        self.offsets = array.array("q")  # starts of documents, and at the end that of the last
        self._tokens = files.enter_context((directory / f"{split}.tokens").open("wb"))
        self._bytes = files.enter_context((directory / f"{split}.bytes").open("wb"))
        self._num_tokens = self._most_bytes = 0
        self._left = 0  # bytes of the document after the end of its last token so far
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._separator = np.array([tokenizer.separator])

    def append(self, ids: np.ndarray, ends: np.ndarray, num_bytes: int, is_first: bool) -> None:
        """Add a piece, as `Encoded`; the first of a document ends the document before it."""
        if is_first:
            if self.offsets:
                self._end_document()
            self.offsets.append(self._num_tokens)
            self._write(self._separator, np.zeros(1, np.int64))
        stops = np.concatenate([[-self._left], ends])
        self._write(ids, np.diff(stops))
        self._left = num_bytes - int(stops[-1])
        self.num_bytes += num_bytes

    def finish(self) -> dict[str, Any]:
        """End the last document and return the split's part of meta.json."""
        self._end_document()
        self.offsets.append(self._num_tokens)
        return {
            "dtype": self._dtype.name,
            "bytes_dtype": np.min_scalar_type(self._most_bytes).name,
            "num_tokens": self._num_tokens,
            "num_documents": len(self.offsets) - 1,
            "num_bytes": self.num_bytes,
        }

    def _end_document(self) -> None:
        self._write(self._separator, np.array([self._left]))
        self._left = 0

    def _write(self, ids: np.ndarray, num_bytes: np.ndarray) -> None:
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._bytes.write(num_bytes.astype(_WIDE).tobytes())
        self._most_bytes = max(self._most_bytes, int(num_bytes.max(initial=0)))
        self._num_tokens += len(ids)


def _narrow(path: pathlib.Path, dtype: str) -> None:
    """Write a file of `_WIDE` numbers anew with those of another type, into which all fit."""
    unfinished = path.with_suffix(".narrow")
    with path.open("rb") as wide, unfinished.open("wb") as narrow:
        while (numbers := np.fromfile(wide, _WIDE, 1 << 18)).size:
            narrow.write(numbers.astype(dtype).tobytes())
    unfinished.replace(path)


def _read(directory: pathlib.Path) -> dict[str, TokenizedSplit] | None:
    """Map what `_tokenize` wrote; None where it is missing or not what meta.json says."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        splits = {}
        for split in SPLITS:
            about = meta[split]
            tokens = np.memmap(directory / f"{split}.tokens", about["dtype"], mode="r")
            token_bytes = np.memmap(directory / f"{split}.bytes", about["bytes_dtype"], mode="r")
            offsets = np.load(directory / f"{split}.offsets.npy")
            sizes = (len(tokens), len(token_bytes), int(offsets[-1]), len(offsets) - 1)
            if sizes != (*(about["num_tokens"],) * 3, about["num_documents"]):
                return None
            splits[split] = TokenizedSplit(tokens, token_bytes, offsets, about["num_bytes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None
    return splits
