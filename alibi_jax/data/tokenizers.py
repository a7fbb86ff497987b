"""Text to token ids and back: bytes, a tokenizer.json, or a BPE or words counted here."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from alibi_jax.data.documents import MayCut
from alibi_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
# The end of a line is a word too. U+001C to U+001F are white space to Python, not to `tokenizers`.
WORD = r"\n|[^\s\x1c-\x1f]+"
# What a tokenizer.json may call the token between documents, in the order of preference.
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<s>", "<bos>", "[CLS]")


_CUTTING = 2  # version of `SubwordTokenizer.may_cut`, on which tokens may depend


class Encoded(NamedTuple):
    """The tokens of a text, and how much of it they stand for."""

    ids: np.ndarray  # int [n]
    ends: np.ndarray  # int64 [n]: UTF-8 bytes of the text up to the end of each token, ascending


class Tokenizer(Protocol):
    """What the corpus needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the separator among them."""

    @property
    def separator(self) -> int:
        """Id of the token that stands before and after every document, and never inside one."""

    @property
    def unknown(self) -> int | None:
        """Id of the token that stands for what the vocabulary lacks; None: it lacks nothing."""

    @property
    def word_level(self) -> bool:
        """Whether tokens are words, so that a perplexity per token is one per word."""

    @property
    def fingerprint(self) -> str:
        """Identifies what text becomes which tokens."""

    @property
    def may_cut(self) -> MayCut | None:
        """Whether two texts have, apart, the tokens that they have together; None: all have."""

    def encode_with_ends(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield the tokens of each text, with nothing added, and where in its bytes they end."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return int [n] token ids of each text, with nothing added."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of token ids [n], separators left out; invalid UTF-8 becomes U+FFFD."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; the separator is 256 and decodes to nothing."""

    vocab_size: int = 257
    separator: int = 256
    unknown: None = None
    word_level: bool = False
    may_cut: None = None
    fingerprint: str = "bytes"

    def encode_with_ends(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield the UTF-8 bytes of each text, each of which ends one byte after the last."""
        for ids in self.encode_batch(texts):
            yield Encoded(ids, np.arange(1, len(ids) + 1))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return uint8 [n] UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of bytes, separators left out; invalid UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, without special tokens, padding or truncation."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # "</s>" in a text is these four characters, not the end of a document.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.separator: int = tokenizer.token_to_id(separator)
        # Ids may have holes.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        model = json.loads(tokenizer.to_str())["model"]
        self.word_level: bool = model["type"] == "WordLevel"
        unknown = model.get("unk_token")
        self.unknown: int | None = (
            model.get("unk_id") if unknown is None else tokenizer.token_to_id(unknown)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's JSON and its separator."""
        content = f"{_CUTTING} {self.separator} {self._tokenizer.to_str()}"
        return hashlib.blake2b(content.encode()).hexdigest()

    def may_cut(self, before: str, after: str) -> bool:
        """Say whether a text may be tokenized in two parts, with the tokens of the whole.

        It may where the tokenizer begins a new word: models see one word at a time. Some put
        something before every text, or have no words at all, so it is asked what it does.

        Args:
            before: The characters before the cut, as many as its words can depend on.
            after: Those after it.
        """
        try:
            whole, left, right = self._encodings([before + after, before, after])
        except UserError:  # half a word, at an end of what is given here, need not have a token
            return False
        cut = len(left.ids)
        shifted = [(start + len(before), stop + len(before)) for start, stop in right.offsets]
        return (
            0 < cut < len(whole.ids)
            and whole.word_ids[cut - 1] != whole.word_ids[cut]
            and whole.ids == left.ids + right.ids
            and whole.offsets == left.offsets + shifted
        )

    def encode_with_ends(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield the tokens of each text, computed on all cores, and where in its bytes they end.

        A character that several tokens share ends with the first of them. Where a token stands for
        nothing of the text, as one that a normalizer puts in, it ends where the one before does.
        """
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            data = np.frombuffer(text.encode(), np.uint8)
            # Bytes before each character, and all of them: 10xxxxxx continues a character.
            places = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))
            stops = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 1]
            ends = np.maximum.accumulate(places[stops])
            yield Encoded(np.array(encoding.ids, np.uint32), ends)

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        try:
            return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing more special
            raise UserError(
                f"the tokenizer has no token for some of the text ({error}); give it one for "
                "unknown words, or take 'bytes', 'bpe:VOCAB_SIZE' or 'words:VOCAB_SIZE'"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return uint32 [n] token ids of each text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of token ids, separators left out."""
        ids = np.asarray(ids)
        return self._tokenizer.decode(
            ids[ids != self.separator].tolist(), skip_special_tokens=False
        )


def load_tokenizer_file(path: pathlib.Path) -> SubwordTokenizer:
    """Load a tokenizer.json as the `tokenizers` and `transformers` libraries write it.

    Args:
        path: The file.

    Raises:
        UserError: It is none, or has no token that can stand between documents.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise UserError(
            f"tokenizer {str(path)!r} is not a tokenizer.json ({error}); give a file that "
            "tokenizers.Tokenizer.save wrote, or 'bytes', 'bpe:VOCAB_SIZE' or 'words:VOCAB_SIZE'"
        ) from error
    for separator in SEPARATORS:
        if tokenizer.token_to_id(separator) is not None:
            return SubwordTokenizer(tokenizer, separator)
    raise UserError(
        f"tokenizer {str(path)!r} has no token to put between documents; "
        f"add one of {' '.join(SEPARATORS)} to it"
    )


def train_bpe(texts: Iterator[str], vocab_size: int, path: pathlib.Path) -> None:
    """Train a byte-level BPE (as GPT-2's) and write its tokenizer.json. Deterministic.

    Args:
        texts: Pieces of text.
        vocab_size: Tokens at most, at least 257: the bytes and the separator.
        path: Where to write.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.write_text(tokenizer.to_str(), encoding="utf-8")


def train_words(texts: Iterator[str], vocab_size: int, path: pathlib.Path) -> None:
    """Number whole words from the most to the least frequent and write a tokenizer.json.

    As fairseq-preprocess does: words are what stands between spaces, the end of a line is one, and
    words that do not fit are `UNKNOWN`, as is that word itself in a text (WikiText has it already).

    Args:
        texts: Pieces of text.
        vocab_size: Tokens at most, at least 3: `UNKNOWN`, words, and last the separator.
        path: Where to write.
    """
    import tokenizers

    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(re.findall(WORD, text))
    del counts[UNKNOWN]
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 2]
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(WORD), behavior="removed", invert=True
    )
    # Added, not a word: "<|endoftext|>" in a text is unknown, not the end of a document.
    tokenizer.add_special_tokens([END_OF_TEXT])
    path.write_text(tokenizer.to_str(), encoding="utf-8")
