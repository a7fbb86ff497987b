"""Text files, plain or compressed, as documents: read in pieces, every failure one clear line."""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from alibi_jax.data.documents import Document, is_blank
from alibi_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".tokens")
LINES_SUFFIX = ".jsonl"
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")

_CHUNK = 1 << 20  # bytes read at once


def kind(path: pathlib.Path) -> str | None:
    """Return the suffix that says how a file is read (".txt", ".jsonl", ...), compression apart.

    Args:
        path: Any path.

    Returns:
        None for a suffix that is not read.
    """
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    return suffix if suffix in (*TEXT_SUFFIXES, LINES_SUFFIX) else None


def read_documents(paths: list[pathlib.Path], text_field: str | None) -> Iterator[Document]:
    """Read the documents of files: one a file, or one a line of .jsonl. Blank ones are left out.

    Args:
        paths: Files of a known `kind`.
        text_field: The field of a .jsonl line that holds the text; None: found in the first line.

    Raises:
        UserError: A file that cannot be read, decompressed, decoded or parsed, and where in it.
    """
    for path in paths:
        if kind(path) == LINES_SUFFIX:
            for where, record in _records(path):
                text_field = text_field or find_text_field(record, where)
                document: Document = [text_of(record, text_field, where)]
                if not is_blank(document):
                    yield document
        elif not is_blank(document := TextFile(path)):
            yield document


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A UTF-8 file as a document; a byte order mark is left out, line ends are kept."""

    path: pathlib.Path

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        read = 0  # bytes given to the decoder, which keeps the last few of them now and then
        for chunk in itertools.chain(_chunks(self.path), (b"",)):  # the empty one ends the text
            start = read - len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(str(self.path), start + error.start, error) from error
            if start == 0:
                text = text.removeprefix("\ufeff")
            read += len(chunk)
            if text:
                yield text


def file_digest(path: pathlib.Path) -> str:
    """Return a hash of the bytes of a file as they are on disk.

    Args:
        path: A file.

    Raises:
        UserError: It cannot be read.
    """
    with _one_line(path), path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def read_bytes(path: pathlib.Path) -> bytes:
    """Return the bytes of a file as they are on disk.

    Args:
        path: A file.

    Raises:
        UserError: It cannot be read.
    """
    with _one_line(path):
        return path.read_bytes()


def find_text_field(record: Mapping[str, Any], where: str) -> str:
    """Find the field of a record that holds its text.

    That is "text", else the only string, else the only string with "text" in its name (book_text
    in pg19).

    Args:
        record: Values of any types; text is `str` or `bytes`.
        where: What the record is called in a message.

    Raises:
        UserError: There is no such field, or more than one.
    """
    if "text" in record:
        return "text"
    strings = [name for name, value in record.items() if isinstance(value, str | bytes)]
    for names in (strings, [name for name in strings if "text" in name]):
        if len(names) == 1:
            return names[0]
    raise UserError(
        f"{where}: no field 'text'; set text_field to the one that holds the text, "
        f"the fields are {_names(record)}"
    )


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return the text of a record.

    Args:
        record: A .jsonl line (text is `str`) or a TFDS example (`bytes`, or `str` where mocked).
        field: The field that holds it.
        where: What the record is called in a message.

    Raises:
        UserError: The field is missing, is not text, or is not valid Unicode.
    """
    if field not in record:
        raise UserError(f"{where}: no field {field!r}; set text_field to one of {_names(record)}")
    text = record[field]
    if not isinstance(text, str | bytes):
        raise UserError(
            f"{where}: field {field!r} holds {type(text).__name__}, not text; set text_field to a "
            f"field with strings, the fields are {_names(record)}"
        )
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()  # JSON can hold half a surrogate pair, which no tokenizer can
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{where}, field {field!r}", error.start, error) from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} has half a surrogate pair at character {error.start}, "
            "which is not Unicode text; remove it"
        ) from error
    return text


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    offset = 0
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset + error.start, error) from error
        offset += len(line)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            # Numbers are not used, and int() refuses long ones: the type is all that matters.
            record = json.loads(text, parse_int=len)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg}, column {error.colno}); "
                "every line of a .jsonl file must be one JSON object"
            ) from error
        except RecursionError as error:
            raise UserError(
                f"{where}: JSON nested too deep to read; remove the line or flatten it"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: a JSON {type(record).__name__}; "
                "every line of a .jsonl file must be one JSON object"
            )
        yield where, record


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    begun: list[bytes] = []  # parts of a line, put together only once: a line can be of any length
    for chunk in _chunks(path):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join((*begun, line, b"\n"))
            begun.clear()
        begun.append(rest)
    yield b"".join(begun)


def _chunks(path: pathlib.Path) -> Iterator[bytes]:
    """Read the decompressed bytes of a file, never much more than one chunk at a time."""
    with _one_line(path):
        if path.suffix.lower() in COMPRESSED_SUFFIXES and not path.stat().st_size:
            raise EOFError  # which gzip and zstandard take for an empty text
        match path.suffix.lower():
            case ".zst":
                yield from _zstandard_chunks(path)
            case ".gz":
                with gzip.open(path) as file:
                    yield from iter(lambda: file.read(_CHUNK), b"")
            case ".xz":
                yield from _xz_chunks(path)
            case _:
                with path.open("rb") as file:
                    yield from iter(lambda: file.read(_CHUNK), b"")


def _xz_chunks(path: pathlib.Path) -> Iterator[bytes]:
    # Not lzma.open: it takes a damaged second stream for the end of the file.
    with path.open("rb") as file:
        data = file.read(_CHUNK)
        while data:
            stream = lzma.LZMADecompressor()
            while not stream.eof:
                if stream.needs_input and not (data := data or file.read(_CHUNK)):
                    raise EOFError
                if chunk := stream.decompress(data, _CHUNK):
                    yield chunk
                data = b""
            data = stream.unused_data.lstrip(b"\0")  # between streams there may be zeros
            while not data and (more := file.read(_CHUNK)):
                data = more.lstrip(b"\0")


def _zstandard_chunks(path: pathlib.Path) -> Iterator[bytes]:
    # Not zstandard.open: it stops after the first frame and takes a truncated file for a whole one.
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` writes
    frame = None
    with path.open("rb") as file:
        while data := file.read(_CHUNK >> 3):
            while data:
                frame = frame or decompressor.decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data
                if frame.eof:
                    frame = None
    if frame:
        raise EOFError


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Turn what the decompressors and the operating system raise into one clear line."""
    import zstandard

    try:
        yield
    except EOFError as error:
        raise UserError(f"{path}: the file is cut off; fetch or compress it again") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(
            f"{path}: not a whole {path.suffix} file ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


def _not_utf8(where: str, offset: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: not UTF-8 at byte {offset} ({error.reason}); "
        "convert it, for instance with iconv -t utf-8"
    )
