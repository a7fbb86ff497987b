"""Text comes back from tokens, in whatever pieces it was encoded."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from alibi_jax.data.tokenizers import (
    ByteTokenizer,
    load_tokenizer_file,
    train_bpe,
    train_words,
)

TEXT = "The quick brown fox jumps over the lazy dog.\nZwölf Boxkämpfer jagen Viktor.\n" * 50


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(iter([TEXT]), 300, path)
    return load_tokenizer_file(path)


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([tokenizer.separator, *ids, tokenizer.separator]) == text


@given(st.text())
def test_bpe_round_trip(bpe, text):
    (ids,) = bpe.encode_batch([text])
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids


def test_bpe_learns_and_has_the_size_asked_for(bpe):
    (ids,) = bpe.encode_batch([TEXT])
    assert bpe.vocab_size == 300
    assert len(ids) < len(TEXT.encode()) / 1.2


def test_a_separator_written_in_a_text_is_text(bpe):
    (ids,) = bpe.encode_batch(["a<|endoftext|>b"])
    assert bpe.separator not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def test_training_is_deterministic(bpe, tmp_path):
    train_bpe(iter([TEXT]), 300, tmp_path / "again.json")
    assert load_tokenizer_file(tmp_path / "again.json").fingerprint == bpe.fingerprint


def test_a_foreign_tokenizer_adds_nothing(tmp_path):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 9}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 9)]
    )
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer_file(tmp_path / "tokenizer.json")
    assert loaded.encode_batch(["a b a b"])[0].tolist() == [1, 2, 1, 2]
    assert (loaded.separator, loaded.vocab_size) == (9, 10)


# As WikiText has them: spaces around every line, and rare words replaced.
LINES = " \n = A <unk> = \n \n b b b a a <unk> \n c a b \n"


def words(tmp_path, size, texts=(LINES,)):
    train_words(iter(texts), size, tmp_path / "tokenizer.json")
    return load_tokenizer_file(tmp_path / "tokenizer.json")


def test_words_are_numbered_from_frequent_to_rare(tmp_path):
    tokenizer = words(tmp_path, 100)
    # 5 ends of lines, 4 b, 3 a, 2 =, then A and c by name; unknown words first, separator last.
    names = ["<unk>", "\n", "b", "a", "=", "A", "c", "<|endoftext|>"]
    assert tokenizer.vocab_size == len(names) and tokenizer.separator == 7
    (ids,) = tokenizer.encode_batch([LINES])
    expected = [names.index(word) for word in LINES.replace("\n", "END").split() if word != "END"]
    assert [i for i in ids.tolist() if names[i] != "\n"] == expected
    assert (ids == 1).sum() == LINES.count("\n") == 5
    assert tokenizer.decode([7, *ids, 7]).strip() == LINES.strip()


def test_words_that_do_not_fit_or_are_new_are_unknown(tmp_path):
    tokenizer = words(tmp_path, 4)
    assert tokenizer.vocab_size == 4
    text = "b zebra a <unk> <|endoftext|>\n"
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == [2, 0, 0, 0, 0, 1] and tokenizer.separator == 3


def test_white_space_is_the_same_in_training_as_later(tmp_path):
    """Python's own split() is the oracle, as fairseq has it, for every character there is."""
    every = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    spaces = "".join(character for character in every if character.isspace())
    assert {"\x1c", "\x1f", "\x85", "\u2028"} < set(spaces)
    text = "".join(f"a{space}b" for space in spaces if space != "\n")
    tokenizer = words(tmp_path, 100, (text,))
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) == len(text.split()) and tokenizer.unknown not in ids


def test_words_do_not_depend_on_pieces_or_order(tmp_path):
    pieces = (LINES[20:], LINES[:20])  # cut at a space
    assert LINES[20] == " "
    assert words(tmp_path, 6, pieces).fingerprint == words(tmp_path, 6).fingerprint
