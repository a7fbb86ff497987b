"""The cache holds the very documents, is reused, and is never believed when damaged."""

import errno
import gzip
import json
import lzma
import pathlib
import sysconfig
import tracemalloc

import numpy as np
import pytest
import zstandard

from alibi_jax.data import DataConfig, corpus, documents, load_corpus
from alibi_jax.data.documents import SPLITS
from alibi_jax.data.sources import open_source
from alibi_jax.data.tokenizers import ByteTokenizer, train_bpe
from alibi_jax.errors import UserError

TEXTS = {
    "train": ["Erste Seite:\r\nÄpfel", "second  document\n", "  third"],
    "valid": ["a validation document"],
    "test": ["日本語", "the last"],
}


def texts_of(loaded):
    """Return {split: texts} decoded from the cached tokens."""
    decoded = {}
    for split in SPLITS:
        tokenized = getattr(loaded, split)
        decoded[split] = [
            loaded.tokenizer.decode(tokenized.document(i)) for i in range(tokenized.num_documents)
        ]
    return decoded


def bytes_of_documents(tokenized):
    starts, stops = tokenized.offsets[:-1], tokenized.offsets[1:]
    return [int(tokenized.token_bytes[a:b].sum()) for a, b in zip(starts, stops, strict=True)]


def write_jsonl(folder, open_file=open, suffix=""):
    for split, texts in TEXTS.items():
        lines = [json.dumps({"title": "t", "text": text}) for text in texts]
        with open_file(folder / f"{split}.jsonl{suffix}", "wb") as file:
            # A blank line, an empty document and no line end at the end of the file.
            file.write("\n\n".join([*lines, json.dumps({"text": " \n"}), lines[0]]).encode())


def config(folder, **changes):
    return DataConfig(
        **{"source": f"files:{folder}/{{split}}.jsonl*", "cache_dir": f"{folder}/cache", **changes}
    )


@pytest.fixture
def jsonl(tmp_path):
    write_jsonl(tmp_path)
    return config(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "open_file"),
    [("", open), (".gz", gzip.open), (".xz", lzma.open), (".zst", zstandard.open)],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_tokens_decode_to_the_documents(tmp_path, suffix, open_file, tokenizer):
    write_jsonl(tmp_path, open_file, suffix)
    loaded = load_corpus(config(tmp_path, tokenizer=tokenizer))
    assert texts_of(loaded) == {split: [*texts, texts[0]] for split, texts in TEXTS.items()}
    for split in SPLITS:
        tokenized = getattr(loaded, split)
        ends = tokenized.tokens[np.r_[tokenized.offsets[:-1], tokenized.offsets[1:] - 1]]
        assert (ends == loaded.tokenizer.separator).all()
        assert (tokenized.tokens == loaded.tokenizer.separator).sum() == len(ends)
        text = "".join([*TEXTS[split], TEXTS[split][0]])
        assert tokenized.num_bytes == len(text.encode())
        assert bytes_of_documents(tokenized) == [
            len(text.encode()) for text in (*TEXTS[split], TEXTS[split][0])
        ]
        # These tokenizers leave nothing out, and nothing for the separators.
        separators = tokenized.tokens == loaded.tokenizer.separator
        assert not tokenized.token_bytes[separators].any()


def test_bytes_of_words_are_those_of_the_source(tmp_path):
    """White space counts with the word after it, at the end with what ends the document."""
    texts = {"train": "a  é c\n é", "valid": " \t a zebra \n ", "test": f"a {'x' * 70_000} a\n"}
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    source = f"files:{tmp_path}/{{split}}.txt"
    loaded = load_corpus(config(tmp_path, source=source, tokenizer="words:5"))
    assert loaded.tokenizer.word_level and loaded.tokenizer.unknown == 0
    #            [    a  é  c \n  é  ]
    assert loaded.train.token_bytes.tolist() == [0, 1, 4, 2, 1, 3, 0]
    #            [    a  ? \n  ]
    assert loaded.valid.token_bytes.tolist() == [0, 4, 6, 2, 1]
    assert loaded.valid.tokens.tolist()[1:4] == [3, 0, 2]
    assert loaded.test.token_bytes.tolist() == [0, 1, 70_001, 2, 1, 0]
    for split, dtype in (("train", np.uint8), ("test", np.uint32)):
        tokenized = getattr(loaded, split)
        assert tokenized.token_bytes.dtype == dtype
        assert tokenized.num_bytes == len(texts[split].encode())


def test_pieces_without_tokens_leave_their_bytes_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_LENGTH", 50)
    text = "a" + " " * 500 + "a" + "\t" * 700
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    source = f"files:{tmp_path}/{{split}}.txt"
    loaded = load_corpus(config(tmp_path, source=source, tokenizer="words:5"))
    assert loaded.train.token_bytes.tolist() == [0, 1, 501, 700]


def test_text_files_and_frames(tmp_path, monkeypatch):
    """A document larger than every buffer, in two zstd frames, with a byte order mark."""
    monkeypatch.setattr(documents, "PIECE_LENGTH", 1000)
    text = "Ein schöner Satz.\r\n" * 200_000
    data = ("\ufeff" + text).encode()
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "train.txt.zst").write_bytes(compress(data[:77_777]) + compress(data[77_777:]))
    (tmp_path / "valid.md").write_text("# valid\n")
    (tmp_path / "test.py").write_text("print()\n")
    loaded = load_corpus(config(tmp_path, source=f"files:{tmp_path}/{{split}}.*"))
    assert texts_of(loaded) == {"train": [text], "valid": ["# valid\n"], "test": ["print()\n"]}


def test_files_without_split_are_split_by_document(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    texts = {f"text {i}" for i in range(30)}
    for i, text in enumerate(sorted(texts)):
        (folder / f"{i}.txt").write_text(text)
    (folder / "skipped.pdf").write_text("no text")
    decoded = texts_of(load_corpus(config(tmp_path, source=f"files:{tmp_path}/**/*")))
    assert all(decoded.values())
    assert set().union(*decoded.values()) == texts
    assert sum(map(len, decoded.values())) == len(texts)


def test_the_only_text_field_is_found(tmp_path):
    line = json.dumps({"id": 3, "body_text": "the body", "title": "no"}) + "\n"
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(line)
    assert texts_of(load_corpus(config(tmp_path)))["train"] == ["the body"]
    assert texts_of(load_corpus(config(tmp_path, text_field="title")))["train"] == ["no"]


def test_second_load_tokenizes_nothing(jsonl, monkeypatch):
    first = load_corpus(jsonl)

    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(ByteTokenizer, "encode_batch", refuse)
    second = load_corpus(jsonl)
    assert second.fingerprint == first.fingerprint
    assert texts_of(second) == texts_of(first)


def test_fingerprint_follows_content_and_tokenizer(jsonl, tmp_path):
    prints = [load_corpus(jsonl).fingerprint, load_corpus(config(tmp_path, tokenizer="bpe:280"))]
    prints[1] = prints[1].fingerprint
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write('\n{"text": "more"}')
    prints.append(load_corpus(jsonl).fingerprint)
    assert len(set(prints)) == 3


def test_moving_the_files_changes_nothing(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name)
    here, there = (load_corpus(config(tmp_path / name)) for name in ("here", "there"))
    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.tokens", lambda path: path.write_bytes(path.read_bytes()[:-2])),
        ("valid.tokens", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("test.tokens", lambda path: path.unlink()),
        ("train.tokens", lambda path: path.write_bytes(b"")),
        ("train.bytes", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("valid.offsets.npy", lambda path: path.write_bytes(path.read_bytes()[:-8])),
        ("meta.json", lambda path: path.write_text("{")),
        ("meta.json", lambda path: path.write_text("[]")),
    ],
)
def test_damaged_cache_is_made_again(jsonl, tmp_path, caplog, name, damage):
    expected = texts_of(load_corpus(jsonl))
    (directory,) = (tmp_path / "cache" / "tokens").iterdir()
    damage(directory / name)
    assert texts_of(load_corpus(jsonl)) == expected
    assert "made again" in caplog.text
    assert list(directory.parent.iterdir()) == [directory]


def test_no_tokenizer_is_trained_on_words_without_end(tmp_path, monkeypatch):
    """Merging within one takes time that grows with its square."""
    (tmp_path / "genome.txt").write_text("ACGT" * 20_000)
    longest = []

    def train(texts, vocab_size, path):
        pieces = list(texts)
        longest.append(max(map(len, pieces)))
        train_bpe(iter(pieces), vocab_size, path)

    monkeypatch.setattr(corpus, "train_bpe", train)
    loaded = load_corpus(config(tmp_path, source=f"files:{tmp_path}/*.txt", tokenizer="bpe:261"))
    assert longest[0] <= 2 * documents.PIECE_LENGTH
    assert "".join(text for texts in texts_of(loaded).values() for text in texts) == "ACGT" * 20_000


def test_damaged_trained_tokenizer_is_trained_again(jsonl, tmp_path):
    changed = config(tmp_path, tokenizer="bpe:280")
    first = load_corpus(changed)
    (path,) = (tmp_path / "cache" / "tokenizers").rglob("tokenizer.json")
    path.write_text(path.read_text()[:100])
    assert load_corpus(changed).fingerprint == first.fingerprint


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_tokenizing_leaves_nothing(jsonl, tmp_path, monkeypatch, error):
    def interrupted(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(ByteTokenizer, "encode_batch", interrupted)
        load_corpus(jsonl)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    load_corpus(jsonl)


def test_a_closed_screen_is_not_taken_for_a_full_disk(jsonl, monkeypatch):
    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(corpus, "_tokenize", closed)
    with pytest.raises(BrokenPipeError):
        load_corpus(jsonl)


def test_a_faster_process_wins(jsonl, tmp_path, monkeypatch):
    tokenize = corpus._tokenize

    def overtaken(*args):
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "_tokenize", tokenize)
            load_corpus(jsonl)  # the other process, from start to end
        tokenize(*args)

    monkeypatch.setattr(corpus, "_tokenize", overtaken)
    loaded = load_corpus(jsonl)
    (directory,) = (tmp_path / "cache" / "tokens").iterdir()
    assert pathlib.Path(loaded.train.tokens.filename).parent == directory


def test_stdlib(stdlib_corpus):
    decoded = texts_of(stdlib_corpus)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert sum((root / "argparse.py").read_bytes().decode() in texts for texts in decoded.values())
    assert stdlib_corpus.train.num_bytes > 4_000_000
    for split in ("valid", "test"):
        assert sum(len(text) > 4200 for text in decoded[split]) >= 10
    # Documents are files; only trivial ones may be alike.
    train = set(decoded["train"])
    assert not [t for s in ("valid", "test") for t in decoded[s] if t in train and len(t) > 500]


def test_stdlib_pass_is_repeatable():
    source = open_source("stdlib", None)
    passes = [[(s, "".join(d)) for s, d in source.read()] for _ in range(2)]
    assert passes[0] == passes[1]


def test_unsplittable_text(tmp_path):
    (tmp_path / "input.txt").write_text("too short")
    with pytest.raises(UserError, match="no text is left for the split 'valid'"):
        load_corpus(config(tmp_path, source=f"files:{tmp_path}/input.txt"))
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_large_corpora_are_streamed(tmp_path):
    """22 MB of documents pass through a fraction of that."""
    line = (json.dumps({"text": "some words " * 1000}) + "\n").encode()
    for split, count in (("train", 2000), ("valid", 1), ("test", 1)):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wb", compresslevel=1) as file:
            for _ in range(count):
                file.write(line)
    streamed = config(tmp_path, source=f"files:{tmp_path}/{{split}}.jsonl.gz")
    tracemalloc.start()
    try:
        assert load_corpus(streamed).train.num_bytes == 22_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 11_000_000
