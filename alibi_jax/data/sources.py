"""Where text comes from: the standard library, files, or TensorFlow Datasets without TensorFlow."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

from alibi_jax.data.documents import SPLITS, Document, hold_out, is_blank, split_of
from alibi_jax.data.files import (
    LINES_SUFFIX,
    TextFile,
    file_digest,
    find_text_field,
    kind,
    read_bytes,
    read_documents,
    text_of,
)
from alibi_jax.data.globs import matching_files
from alibi_jax.errors import UserError
from alibi_jax.files import given_path

# `encodings` is 120 near copies of one table: in two splits they would give the answers away.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents by split."""

    name: str  # as the user gave it
    fingerprint: str  # of the content and of what decides the splits
    # Starts a pass: (split, document), split in SPLITS, no document blank.
    read: Callable[[], Iterator[tuple[str, Document]]]


def open_source(source: str, text_field: str | None) -> Source:
    """Find the text and fingerprint it; nothing is decoded yet, except in the standard library.

    Args:
        source: A checked `DataConfig.source`.
        text_field: `DataConfig.text_field`.

    Raises:
        UserError: There is no such text, or it cannot be read. A pass over the source raises it
            too, where the text turns out to be malformed.
    """
    if source == "stdlib":
        _no_fields(source, text_field)
        return stdlib_source()
    if source.startswith("files:"):
        return files_source(source, text_field)
    return tfds_source(source, text_field)


def _no_fields(source: str, text_field: str | None) -> None:
    if text_field is not None:
        raise UserError(
            f"config.data.text_field={text_field!r}: source {source!r} has no fields, which only "
            f"{LINES_SUFFIX} files and TFDS examples have; leave it out"
        )


def stdlib_source(root: pathlib.Path | None = None) -> Source:
    """Return the Python sources of the standard library, about 10 MB, split by a hash of the path.

    Args:
        root: Folder of the library; None: that of this interpreter.

    Raises:
        UserError: It has no sources (some distributions ship it zipped or compiled only).
    """
    root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
    content = hashlib.blake2b(b"stdlib")
    documents: list[tuple[str, Document]] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _STDLIB_WITHOUT.intersection(name.split("/")):
            continue
        data = read_bytes(path)
        try:
            data.decode()
        except UnicodeDecodeError:  # a few sources and samples are in other encodings
            continue
        if not data.strip():
            continue
        content.update(f"{name}\0{len(data)}\0".encode() + data)
        documents.append((split_of(name.encode(), ("valid", "test")), TextFile(path)))
    if {split for split, _ in documents} != set(SPLITS):
        raise UserError(
            f"source 'stdlib': {root} holds {len(documents)} Python sources, too few to train on "
            "(this Python ships them zipped or compiled); give your own text, 'files:GLOB'"
        )
    return Source("stdlib", content.hexdigest(), lambda: iter(documents))


def files_source(source: str, text_field: str | None) -> Source:
    """Return the documents of files.

    With `{split}` in the glob the files are split already: it stands for train, valid and test.
    Without it valid and test are held out of the documents by `hold_out`.

    Args:
        source: "files:GLOB"; `**` stands for any folders, `~` for the home folder.
        text_field: The field of a .jsonl line that holds the text; None: found in the first line.

    Raises:
        UserError: The glob matches nothing that can be read.
    """
    pattern = str(given_path("config.data.source", source.removeprefix("files:")))
    if "{split}" not in pattern:
        paths = matching_files(pattern)
        _check_fields(source, text_field, paths)
        fingerprint = _files_fingerprint({"all": paths}, text_field)
        return Source(
            source,
            fingerprint,
            lambda: hold_out(lambda: read_documents(paths, text_field), ("valid", "test")),
        )

    by_split = {split: matching_files(pattern.replace("{split}", split)) for split in SPLITS}
    _check_fields(source, text_field, [path for paths in by_split.values() for path in paths])
    seen: dict[pathlib.Path, str] = {}
    for split, paths in by_split.items():
        for path in paths:
            if (other := seen.setdefault(path.resolve(), split)) != split:
                raise UserError(
                    f"source {source!r}: {path} is in {other} and in {split}; "
                    "make the glob match every file for one split only"
                )

    def read() -> Iterator[tuple[str, Document]]:
        for split, paths in by_split.items():
            for document in read_documents(paths, text_field):
                yield split, document

    return Source(source, _files_fingerprint(by_split, text_field), read)


def _check_fields(source: str, text_field: str | None, paths: list[pathlib.Path]) -> None:
    if not any(kind(path) == LINES_SUFFIX for path in paths):
        _no_fields(source, text_field)


def _files_fingerprint(by_split: dict[str, list[pathlib.Path]], text_field: str | None) -> str:
    # Names are relative to the folder that all files share, so that moving it changes nothing.
    absolute = [path.absolute() for paths in by_split.values() for path in paths]
    root = os.path.commonpath([path.parent for path in absolute])
    content = {
        split: [(os.path.relpath(path, root), file_digest(path)) for path in paths]
        for split, paths in by_split.items()
    }
    return _hash(["files", content, text_field])


def tfds_source(source: str, text_field: str | None) -> Source:
    """Return a text data set of TensorFlow Datasets, read from ArrayRecord without TensorFlow.

    For instance tiny_shakespeare, lm1b, pg19, wiki40b/en. A set that is not in $TFDS_DATA_DIR
    (default ~/tensorflow_datasets) is downloaded and prepared first. A split that it lacks (lm1b
    has no validation) is held out of train by `hold_out`.

    Args:
        source: "tfds:NAME[/CONFIG][:VERSION]".
        text_field: The feature that holds the text; None: found in the first example.

    Raises:
        UserError: There is no such data set, or it could not be prepared or read.
    """
    import tensorflow_datasets as tfds

    name = source.removeprefix("tfds:")
    data_dir = given_path("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    # As tfds.data_source does by itself where it is given no data_dir.
    builder_kwargs = {"file_format": tfds.core.FileFormat.ARRAY_RECORD}
    # Only what the data set's own code fetches: Google's copies are no ArrayRecords.
    prepare = {"download_config": tfds.download.DownloadConfig(try_download_gcs=False)}

    def load(split: str) -> Any:
        try:
            return tfds.data_source(
                name,
                split=split,
                data_dir=data_dir,
                builder_kwargs=builder_kwargs,
                download_and_prepare_kwargs=prepare,
            )
        except Exception as error:  # anything at all: it runs downloads and third-party builders
            reason = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
            raise UserError(
                f"source {source!r}: cannot be loaded from {data_dir} ({reason}); set "
                "TFDS_DATA_DIR to where it is prepared, or where there is a network run: "
                f'python -c "import tensorflow_datasets as tfds; tfds.data_source({name!r})"'
            ) from error

    examples = {"train": load("train")}
    info = examples["train"].dataset_info
    for split, names in (("valid", ("validation", "valid", "dev")), ("test", ("test",))):
        if found := next((name for name in names if name in info.splits), None):
            examples[split] = load(found)
    held_out = [split for split in SPLITS if split not in examples]

    def documents(split: str) -> Iterator[Document]:
        field = text_field
        for index in range(len(examples[split])):
            where = f"{source}, {split} example {index}"
            try:
                example = examples[split][index]
            except Exception as error:  # whatever ArrayRecord raises at a damaged file
                raise UserError(
                    f"{where}: cannot be read ({error}); prepare the data set in {data_dir} again"
                ) from error
            field = field or find_text_field(example, where)
            document = [text_of(example, field, where)]
            if not is_blank(document):
                yield document

    def read() -> Iterator[tuple[str, Document]]:
        yield from hold_out(lambda: documents("train"), held_out)
        for split in examples:
            if split != "train":
                for document in documents(split):
                    yield split, document

    shards = {
        split.name: [split.num_examples, split.num_bytes, list(split.shard_lengths)]
        for split in info.splits.values()
    }
    return Source(source, _hash(["tfds", info.full_name, shards, text_field]), read)


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()
