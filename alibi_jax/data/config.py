"""What a person can say about the data, and the check of it before anything is read."""

import dataclasses
import difflib
from typing import Literal

from alibi_jax import fields
from alibi_jax.errors import UserError, require
from alibi_jax.files import given_path

SCHEMES = ("stdlib", "files:", "tfds:")
# Smallest vocabularies: the 256 bytes and the separator; unknown words, one word, the separator.
SMALLEST = {"bpe": 257, "words": 3}
LARGEST = 1 << 21  # tokens; the largest in the literature have a few hundred thousand


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes batches."""

    # "stdlib": the Python sources on this machine, no download; "files:GLOB": .txt .md .py .tokens
    # .jsonl, also .gz .xz .zst, with {split} for files split already; "tfds:NAME[/CONFIG]".
    source: str = "stdlib"
    # Field of a .jsonl line or a TFDS example; None: "text", or the only field that it can be.
    text_field: str | None = None
    # "bytes"; "bpe:VOCAB_SIZE" or "words:VOCAB_SIZE", made from the train split (words are what
    # stands between spaces, and the ends of lines); or the path of a tokenizer.json.
    tokenizer: str = "bytes"
    # "documents": neither attention nor targets cross a document; "stream": one plain stream.
    packing: Literal["documents", "stream"] = "documents"
    # Tokens per training sequence.
    sequence_length: int = 128
    # Sequences per step, over all devices.
    batch_size: int = 16
    # Where tokens are cached; None: $XDG_CACHE_HOME/alibi_jax or ~/.cache/alibi_jax.
    cache_dir: str | None = None

    def validate(self) -> None:
        """Check every value without reading any data; raise UserError for one that cannot work."""
        fields.check(self, "config.data")
        _check_source(self.source)
        _check_tokenizer(self.tokenizer)
        for name in ("sequence_length", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"config.data.{name}={value}: must be at least 1")


def trained_tokenizer(spec: str) -> tuple[str, int] | None:
    """Return kind and vocabulary size of a tokenizer to be made from the text, None of any other.

    Args:
        spec: A checked `DataConfig.tokenizer`.
    """
    kind, colon, size = spec.partition(":")
    return (kind, int(size)) if colon and kind in SMALLEST else None


def _check_source(source: str) -> None:
    if source == "stdlib":
        return
    for scheme, example in (("files:", "files:~/books/*.txt"), ("tfds:", "tfds:tiny_shakespeare")):
        if source == scheme:
            raise UserError(
                f"config.data.source={source!r} names nothing; write for instance {example!r}"
            )
        if source.startswith(scheme):
            return
    if source and given_path("config.data.source", source).exists():
        raise UserError(
            f"config.data.source={source!r} is a path; write 'files:{source}' to train on a file, "
            f"or 'files:{source.rstrip('/')}/**/*.txt' for a folder"
        )
    scheme = source.split(":")[0] + (":" if ":" in source else "")
    raise UserError(
        f"config.data.source={source!r} is not known; use 'stdlib', 'files:GLOB' or 'tfds:NAME'"
        + _suggestion(scheme, SCHEMES)
    )


def _check_tokenizer(spec: str) -> None:
    if spec == "bytes":
        return
    kind, colon, size = spec.partition(":")
    if colon and kind in SMALLEST:
        digits = size.isascii() and size.isdigit() and len(size) <= len(str(LARGEST))
        if not digits or not SMALLEST[kind] <= int(size) <= LARGEST:
            raise UserError(
                f"config.data.tokenizer={spec!r} is not '{kind}:VOCAB_SIZE' with a whole number "
                f"from {SMALLEST[kind]} to {LARGEST}; write for instance '{kind}:8192'"
            )
        return
    path = given_path("config.data.tokenizer", spec)
    if path.is_dir():
        raise UserError(
            f"config.data.tokenizer={spec!r} is a folder; give the path of its tokenizer.json"
        )
    if not path.is_file():
        raise UserError(
            f"config.data.tokenizer={spec!r} is neither 'bytes', nor 'bpe:VOCAB_SIZE', nor "
            "'words:VOCAB_SIZE', nor a file that exists; give one of these"
            + _suggestion(spec, ("bytes", "bpe:8192", "words:8192"))
        )


def _suggestion(given: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(given, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
