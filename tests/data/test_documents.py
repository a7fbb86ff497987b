"""Pieces lose nothing, and what is held out never shares text with what is trained on."""

import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alibi_jax.data import documents
from alibi_jax.data.documents import SPLITS, bounded_pieces, hold_out


def split_up(texts):
    """Return {split: texts} of in-memory documents."""
    splits = {split: [] for split in SPLITS}
    for split, document in hold_out(lambda: iter([[text] for text in texts]), SPLITS[1:]):
        splits[split].append("".join(document))
    return splits


@given(st.lists(st.text(alphabet="ab \n\té"), max_size=20), st.integers(1, 8))
def test_bounded_pieces_are_the_document(pieces, length):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_LENGTH", length)
        patch.setattr(documents, "_CONTEXT", 1)
        anywhere, at_words = (
            list(bounded_pieces(pieces, may_cut)) for may_cut in (None, lambda *_: True)
        )
    assert "".join(anywhere) == "".join(at_words) == "".join(pieces)
    assert all(0 < len(piece) <= length + 1 for piece in anywhere)
    assert all(piece[0].isspace() for piece in at_words[1:])


def test_pieces_are_cut_before_a_space_after_a_word(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_LENGTH", 12)
    monkeypatch.setattr(documents, "_CONTEXT", 2)
    text = "one two   three four five"
    asked = []

    def not_after_two(before, after):
        asked.append((before, after))
        return before != "wo"

    assert list(bounded_pieces([text], lambda *_: True)) == ["one two", "   three", " four five"]
    assert list(bounded_pieces([text], not_after_two)) == ["one", " two   three", " four five"]
    assert asked == [("wo", "  "), ("ne", " t"), ("ee", " f")]
    assert list(bounded_pieces([text], lambda *_: False)) == [text]


def test_many_documents_are_split_by_content():
    texts = [f"document {i}" for i in range(4000)]
    splits = split_up(texts)
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    assert 150 < len(splits["valid"]) < 250 and 150 < len(splits["test"]) < 250
    # Order and neighbours do not matter.
    again = split_up(texts[2000:] + texts[:100])
    assert set(again["valid"]) <= set(splits["valid"])


def test_copies_are_in_one_split():
    texts = [f"document {i % 300}" for i in range(900)]
    splits = split_up(texts)
    assert [len(set(splits[split])) * 3 == len(splits[split]) for split in SPLITS] == [True] * 3
    assert sum(len(set(documents)) for documents in splits.values()) == 300


@given(st.sets(st.text(string.ascii_letters, min_size=1), min_size=3, max_size=40))
def test_few_documents_leave_no_split_empty(texts):
    splits = split_up(sorted(texts))
    assert all(splits.values())
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)


def test_the_longest_of_three_documents_is_for_training():
    for i in range(20):  # whatever its hash
        longest = f"{i}" * 1000
        assert split_up([f"short {i}", longest, f"other {i}"])["train"] == [longest]


def test_a_single_document_is_cut_contiguously():
    text = "".join(f"{i:04d}" for i in range(500))
    assert split_up([text]) == {
        "train": [text[:1800]],
        "valid": [text[1800:1900]],
        "test": [text[1900:]],
    }


def test_two_documents_are_each_cut():
    splits = split_up(["a" * 100, "b" * 200])
    assert splits["train"] == ["a" * 90, "b" * 180]
    assert splits["test"] == ["a" * 5, "b" * 10]
