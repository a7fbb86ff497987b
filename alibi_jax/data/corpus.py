"""A tokenized corpus: three splits of documents, cached on disk and mapped into memory."""

import array
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from alibi_jax.data.config import DataConfig, trained_tokenizer
from alibi_jax.data.documents import SPLITS, bounded_pieces
from alibi_jax.data.sources import Source, open_source
from alibi_jax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer_file,
    train_bpe,
    train_words,
)
from alibi_jax.errors import UserError

FORMAT = 1  # of the cached files and of how text is cut into tokens; part of every key
_PIECES_AT_ONCE = 256  # of documents.PIECE_LENGTH characters: bounds the memory of tokenizing

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """The documents of one split, one after the other.

    Every document stands as separator, its tokens, separator: so its first token is predicted from
    something and its end is learned.
    """

    tokens: np.ndarray  # uint16 or uint32 [N], mapped from disk
    offsets: np.ndarray  # int64 [num_documents + 1]: document i is tokens[offsets[i]:offsets[i+1]]
    num_bytes: int  # UTF-8 bytes of the text

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def bytes_per_token(self, packing: str) -> float:
        """UTF-8 bytes for each target: nats/token / ln 2 / this = bits/byte.

        Targets are all tokens but the first: of each document, or of the stream.

        Args:
            packing: As `DataConfig.packing`.
        """
        firsts = self.num_documents if packing == "documents" else 1
        return self.num_bytes / (len(self.tokens) - firsts)

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
    directory = cache / "tokens" / fingerprint
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
        return pathlib.Path(config.cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "alibi_jax"


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def _load_tokenizer(config: DataConfig, source: Source, cache: pathlib.Path) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    trained = trained_tokenizer(config.tokenizer)
    if trained is None:
        return load_tokenizer_file(pathlib.Path(config.tokenizer).expanduser())
    directory = cache / "tokenizers" / _key(source.fingerprint, *trained)
    path = directory / "tokenizer.json"
    if path.is_file():
        with contextlib.suppress(UserError):  # damaged: train it again
            return load_tokenizer_file(path)
        _remove_damaged(directory)
    texts = (
        piece
        for split, document in source.read()
        if split == "train"
        for piece in bounded_pieces(document)
    )
    with _written_whole(directory) as unfinished:
        kind, vocab_size = trained
        train = {"bpe": train_bpe, "words": train_words}[kind]
        train(texts, vocab_size, unfinished / path.name)
    return load_tokenizer_file(path)


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
        writers = {
            split: _SplitWriter(
                files.enter_context((directory / f"{split}.tokens").open("wb")), tokenizer
            )
            for split in SPLITS
        }
        pieces = (
            (split, piece, number == 0)
            for split, document in source.read()
            for number, piece in enumerate(bounded_pieces(document))
        )
        while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (split, piece, is_first), ids in zip(batch, encoded, strict=True):
                num_bytes = len(piece.encode())
                writers[split].append(ids, num_bytes, is_first)
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
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))


class _SplitWriter:
    """Appends documents to the token file of one split."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self.num_bytes = 0
        self.offsets = array.array("q")  # starts of documents, and at the end that of the last
        self._file = file
        self._num_tokens = 0
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._separator = np.array([tokenizer.separator])

    def append(self, ids: np.ndarray, num_bytes: int, is_first: bool) -> None:
        """Add a piece (token ids [n]); the first of a document ends the document before it."""
        if is_first:
            if self.offsets:
                self._write(self._separator)
            self.offsets.append(self._num_tokens)
            self._write(self._separator)
        self._write(ids)
        self.num_bytes += num_bytes

    def finish(self) -> dict[str, object]:
        """End the last document and return the split's part of meta.json."""
        self._write(self._separator)
        self.offsets.append(self._num_tokens)
        return {
            "dtype": self._dtype.name,
            "num_tokens": self._num_tokens,
            "num_documents": len(self.offsets) - 1,
            "num_bytes": self.num_bytes,
        }

    def _write(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self._num_tokens += len(ids)


def _read(directory: pathlib.Path) -> dict[str, TokenizedSplit] | None:
    """Map what `_tokenize` wrote; None where it is missing or not what meta.json says."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        splits = {}
        for split in SPLITS:
            about = meta[split]
            path = directory / f"{split}.tokens"
            tokens = np.memmap(path, about["dtype"], mode="r")
            offsets = np.load(directory / f"{split}.offsets.npy")
            shapes = (tokens.shape, offsets.shape, int(offsets[-1]))
            num_tokens = about["num_tokens"]
            if shapes != ((num_tokens,), (about["num_documents"] + 1,), num_tokens):
                return None
            splits[split] = TokenizedSplit(tokens, offsets, about["num_bytes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None
    return splits
