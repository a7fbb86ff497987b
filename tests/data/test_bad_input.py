"""Whatever is given, one clear line: what it was, what is allowed, what to do."""

import gzip
import json
import lzma
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tokenizers
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from alibi_jax.data import DataConfig, files, load_corpus, sources
from alibi_jax.errors import UserError
from tests.disks import disk as disk

LINE = b'{"title": "a", "text": "some text"}\n'


def refused(config, words):
    with pytest.raises(UserError) as caught:
        load_corpus(config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < (5500 if "1" * 5000 in message else 600)
    assert re.search(words, message), message


CONFIGS = [
    ({"sequence_length": 0}, "sequence_length=0: must be at least 1"),
    ({"batch_size": -1}, "batch_size=-1: must be at least 1"),
    ({"source": "stdlb"}, "source='stdlb' .*did you mean 'stdlib'"),
    ({"source": "file:a.txt"}, "source='file:a.txt' .*did you mean 'files:'"),
    ({"source": "tdfs:lm1b"}, "did you mean 'tfds:'"),
    ({"source": ""}, "source='' is not known"),
    ({"source": "files:"}, "names nothing"),
    ({"source": "tfds:"}, "names nothing; write for instance 'tfds:tiny_shakespeare'"),
    ({"source": "x" * 300}, "source='x+' is no path that can be used .File name too long"),
    ({"source": "~no_such_user/a.txt"}, "source=~no_such_user/a.txt: there is no such home folder"),
    ({"source": "."}, r"is a path; write 'files:\.'"),
    ({"tokenizer": "bpe:256"}, "'bpe:256' is not 'bpe:VOCAB_SIZE' .* from 257 to"),
    ({"tokenizer": "bpe:100000000"}, "whole number from 257 to 2097152"),
    ({"tokenizer": f"words:{'1' * 5000}"}, "whole number from 3 to 2097152"),
    ({"tokenizer": "x" * 300}, "no path that can be used .File name too long"),
    (
        {"tokenizer": "~no_such_user/tokenizer.json"},
        "tokenizer=~no_such_user/tokenizer.json: there is no such home folder",
    ),
    ({"tokenizer": "bpe:8k"}, "'bpe:8k' is not 'bpe:VOCAB_SIZE'"),
    ({"tokenizer": "bpe:"}, "write for instance 'bpe:8192'"),
    ({"tokenizer": "byte"}, "'byte' is neither .*did you mean 'bytes'"),
    ({"tokenizer": "missing/tokenizer.json"}, "nor a file that exists"),
    ({"tokenizer": "."}, "is a folder; give the path of its tokenizer.json"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGS)
def test_config(changes, words, monkeypatch):
    monkeypatch.setattr(sources, "open_source", None)  # refused before anything is read
    refused(DataConfig(**changes), words)


def test_defaults_are_valid():
    DataConfig().validate()
    DataConfig(source="files:*.txt", tokenizer="bpe:257", packing="stream").validate()


FILES = [
    ("a.txt", b"abc\xff", "a.txt: not UTF-8 at byte 3 .*iconv"),
    ("a.txt", b"x" * (1 << 20) + b"\xc3\x28", "not UTF-8 at byte 1048576 "),
    ("a.txt", b"x" * ((1 << 20) - 1) + b"\xe6\x97", "not UTF-8 at byte 1048575 .*unexpected end"),
    ("a.txt", "ä".encode("utf-16"), "not UTF-8 at byte 0"),
    ("a.jsonl", LINE + b'{"text": "\xe9"}', "line 2: not UTF-8 at byte 46 "),
    ("a.jsonl", LINE + b'{"text": "abc}\n', "line 2: not JSON .*one JSON object"),
    ("a.jsonl", LINE + b"[1]\n", "line 2: a JSON list"),
    ("a.jsonl", LINE + b'{"title": "b", "body": "c"}', "line 2: no field 'text'.*'title', 'body'"),
    ("a.jsonl", b'{"title": "b", "body": "c"}', "line 1: no field 'text'; set text_field"),
    ("a.jsonl", b"{}", "the fields are none"),
    ("a.jsonl", LINE + b'{"text": null}', "line 2: field 'text' holds NoneType, not text"),
    ("a.jsonl", LINE + b'{"text": ["b"]}', "line 2: field 'text' holds list, not text"),
    ("a.jsonl", b'{"text": "ab\\ud800"}', "half a surrogate pair at character 2"),
    ("a.jsonl", b"[" * 100_000, "line 1: JSON nested too deep"),
    ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], r"a.txt.gz: the file is cut off"),
    ("a.txt.xz", lzma.compress(b"text " * 999)[:-9], r"a.txt.xz: the file is cut off"),
    ("a.txt.zst", zstandard.compress(b"text " * 999)[:-9], r"a.txt.zst: the file is cut off"),
    ("a.txt.gz", b"no archive", "a.txt.gz: not a whole .gz file"),
    ("a.txt.xz", b"no archive", "a.txt.xz: not a whole .xz file"),
    ("a.txt.zst", b"no archive", "a.txt.zst: not a whole .zst file"),
    (
        "a.txt.gz",
        gzip.compress(b"text " * 999, mtime=0)[:30] + b"\xff" * 30,
        "not a whole .gz file",
    ),
    ("a.txt.gz", b"", "a.txt.gz: the file is cut off"),
    ("a.txt.xz", b"", "a.txt.xz: the file is cut off"),
    ("a.txt.zst", b"", "a.txt.zst: the file is cut off"),
    ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0) + b"damaged", "not a whole .gz file"),
    ("a.txt.xz", lzma.compress(b"text " * 99) + b"damaged", "not a whole .xz file"),
    ("a.txt.xz", 2 * lzma.compress(b"text " * 99)[:-9], "not a whole .xz file"),
    ("a.txt.xz", (2 * lzma.compress(b"text " * 99))[:-9], "the file is cut off"),
    ("a.txt.zst", zstandard.compress(b"text " * 99) + b"damaged", "not a whole .zst file"),
    ("a.txt", b"", "no text is left for the split 'train'"),
    ("a.txt", b" \n\t", "no text is left"),
    ("a.jsonl", b"\n\n", "no text is left"),
    ("a.pdf", b"%PDF", r"matches no file that can be read, only .pdf; allowed are .txt"),
    ("a.gz", gzip.compress(b"text", mtime=0), "only .gz; allowed are"),
]


@pytest.mark.parametrize(("name", "data", "words"), FILES)
def test_file(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    refused(DataConfig(source=f"files:{tmp_path}/*", cache_dir=str(tmp_path / "cache")), words)


def test_no_match(tmp_path):
    refused(DataConfig(source=f"files:{tmp_path}/*.txt"), "no file matches .*; check the path")


def test_folder(tmp_path):
    refused(DataConfig(source=f"files:{tmp_path}/"), "is a folder; give a glob.*/\\*\\*/\\*.txt'")


@pytest.mark.parametrize("source", ["stdlib", "files:{}/*.txt"])
def test_text_field_where_there_are_no_fields(tmp_path, source):
    (tmp_path / "a.txt").write_text("text")
    refused(
        DataConfig(source=source.format(tmp_path), text_field="nonsense"),
        "text_field='nonsense': source .* has no fields, .*leave it out",
    )


def test_no_home(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")  # as where $HOME is not set

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    refused(DataConfig(), "cache_dir=~/.cache: there is no such home folder")


def test_files_are_utf8_in_any_locale(tmp_path):
    program = "import pathlib, sys; from alibi_jax.data import tokenizers as t; "
    program += "path = pathlib.Path(sys.argv[1]); t.train_bpe(iter(['\\xe9']), 257, path); "
    program += "t.load_tokenizer_file(path)"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(
        command, env=os.environ | ascii_only, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@given(st.lists(st.text(alphabet="aé ", max_size=9), min_size=1), st.integers(1, 5))
def test_lines_of_any_length(lines, chunk):
    """Whatever pieces a file comes in, and it need not end with the end of a line."""
    data = "\n".join(lines).encode()
    with pytest.MonkeyPatch.context() as patch:
        chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
        patch.setattr(files, "_chunks", lambda path: iter(chunks))
        assert list(files._lines(None)) == data.splitlines(keepends=True) + (
            [b""] if data[-1:] in (b"", b"\n") else []
        )


def test_long_integers_beside_the_text_do_not_matter(tmp_path):
    line = b'{"id": %s, "text": "some text"}\n' % (b"7" * 5000)
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(line)
    source = f"files:{tmp_path}/{{split}}.jsonl"
    assert load_corpus(DataConfig(source=source, cache_dir=str(tmp_path))).train.num_bytes == 9


def test_a_size_that_the_text_does_not_give_is_said(tmp_path, caplog):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a b c")
    source = f"files:{tmp_path}/{{split}}.txt"
    load_corpus(DataConfig(source=source, tokenizer="words:1000", cache_dir=str(tmp_path)))
    assert "words:1000: the text gives 5 tokens only" in caplog.text


def test_missing_split(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    refused(DataConfig(source=f"files:{tmp_path}/{{split}}.txt"), "no file matches .*valid.txt")


def test_file_in_two_splits(tmp_path):
    for name in ("train.txt", "valid.txt", "valid_test.txt"):
        (tmp_path / name).write_text("text")
    refused(
        DataConfig(source=f"files:{tmp_path}/*{{split}}*.txt"), "valid_test.txt is in valid and in"
    )


def test_missing_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    refused(
        DataConfig(
            source=f"files:{tmp_path}/*.jsonl", text_field="txt", cache_dir=str(tmp_path / "cache")
        ),
        "line 1: no field 'txt'; set text_field to one of 'title', 'text'",
    )


def test_bad_text_met_by_bpe_training(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    refused(
        DataConfig(
            source=f"files:{tmp_path}/*.txt", tokenizer="bpe:300", cache_dir=str(tmp_path / "cache")
        ),
        "not UTF-8 at byte 0",
    )
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").symlink_to("a.txt")  # a loop: unreadable even for root
    refused(DataConfig(source=f"files:{tmp_path}/*.txt"), "a.txt: cannot be read .*permissions")


def test_unwritable_cache(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "cache").write_text("a file, not a folder")
    refused(
        DataConfig(source=f"files:{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache")),
        "cache_dir: cannot write .*set cache_dir",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=8k", "cannot write .*No space left on device.*set cache_dir"),
        ("size=8k,ro", "cannot write .*Read-only file system.*set cache_dir"),
    ],
)
def test_cache_on_a_bad_disk(tmp_path, disk, options, words):
    disk.mount(options)
    (tmp_path / "a.txt").write_text("text " * 9999)
    refused(DataConfig(source=f"files:{tmp_path}/*.txt", cache_dir=str(disk.path / "cache")), words)
    assert not list(disk.path.rglob(".unfinished-*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "is not a tokenizer.json"),
        ("no json", "is not a tokenizer.json"),
        (None, "no token to put between documents; add one of <|endoftext|>".replace("|", r"\|")),
    ],
)
def test_tokenizer_file(tmp_path, content, words):
    path = tmp_path / "tokenizer.json"
    if content is None:
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    else:
        path.write_text(content)
    (tmp_path / "a.txt").write_text("text " * 100)
    refused(
        DataConfig(
            source=f"files:{tmp_path}/*.txt", tokenizer=str(path), cache_dir=str(tmp_path / "cache")
        ),
        words,
    )


def test_a_tokenizer_without_a_token_for_some_text(tmp_path):
    vocabulary = tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(vocabulary).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("b" * 100)
    refused(
        DataConfig(
            source=f"files:{tmp_path}/*.txt",
            tokenizer=str(tmp_path / "tokenizer.json"),
            cache_dir=str(tmp_path / "cache"),
        ),
        "has no token for some of the text .*give it one for unknown words",
    )


def test_stdlib_without_sources(tmp_path):
    (tmp_path / "one.py").write_text("print()")
    with pytest.raises(UserError, match=r"holds 1 Python sources.*give your own text"):
        sources.stdlib_source(pathlib.Path(tmp_path))


def test_messages_name_the_line_in_a_late_file(tmp_path):
    lines = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(1000))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines + b"oops\n"))
    refused(
        DataConfig(source=f"files:{tmp_path}/*.xz", cache_dir=str(tmp_path / "cache")),
        "b.jsonl.xz, line 1001: not JSON",
    )
