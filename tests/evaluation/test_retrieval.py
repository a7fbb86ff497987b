"""Needles and pairs stand where they should, for every tokenizer that has the symbols."""

import numpy as np
import pytest

from alibi_jax.data.tokenizers import ByteTokenizer, load_tokenizer_file, train_bpe, train_words
from alibi_jax.evaluation.retrieval import (
    CUE,
    DEPTHS,
    found,
    needle_rows,
    recall_rows,
    shortest,
    symbols_of,
)

SYMBOLS = symbols_of(ByteTokenizer().encode_batch)
FILLER = np.tile(np.arange(200, 328), (6, 1)) % 57 + 200  # neither digits nor letters


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("length", [64, 100])
def test_a_needle_stands_at_its_depth_and_is_asked_for_at_the_end(depth, length):
    rows, distance = needle_rows(FILLER, length, depth, SYMBOLS)
    assert rows.shape == (6, length + 1) and rows.dtype == np.int32
    cue = np.frombuffer(CUE.encode(), np.uint8)
    starts = []
    for row, filler in zip(rows, FILLER, strict=True):
        answer = row[-5:]
        assert np.isin(answer, SYMBOLS.values).all()
        assert (row[-5 - len(cue) : -5] == cue).all()
        places = [i for i in range(length - 4) if (row[i : i + len(cue)] == cue).all()]
        assert len(places) == 2
        start = places[0] + len(cue)
        assert (row[start : start + 5] == answer).all()
        # What predicts the first symbol is the token before it.
        assert (length + 1 - 5 - 1) - start == distance
        rest = np.delete(row, np.r_[places[0] : start + 5, places[1] : length + 1])
        assert (rest == filler[: len(rest)]).all()
        starts.append(places[0])
    body = length + 1 - 2 * (len(cue) + 5)
    assert set(starts) == {1 + round(depth * (body - 1))}
    again, _ = needle_rows(FILLER, length, depth, SYMBOLS)
    np.testing.assert_array_equal(rows, again)


def test_needles_differ_between_trials_lengths_and_depths():
    answers = [
        needle_rows(FILLER, length, depth, SYMBOLS)[0][:, -5:]
        for length in (64, 100)
        for depth in (0.0, 0.5)
    ]
    assert len(np.unique(np.concatenate(answers), axis=0)) == 24


def test_pairs_stand_at_the_start_and_are_asked_for_in_another_order():
    rows, distance = recall_rows(FILLER, 100, SYMBOLS)
    assert rows.shape == (6, 101)
    distances = []
    for row in rows:
        early, late = row[1:17].reshape(8, 2), row[-16:].reshape(8, 2)
        assert np.isin(early[:, 0], SYMBOLS.keys).all() and len(set(early[:, 0])) == 8
        assert np.isin(early[:, 1], SYMBOLS.values).all()
        assert dict(early.tolist()) == dict(late.tolist())
        assert (early != late).any()
        for query in range(8):
            value = 2 + 2 * early[:, 0].tolist().index(late[query, 0])
            distances.append(101 - 16 + 2 * query - value)
    assert np.mean(distances) == distance


def test_only_the_alphabet_competes():
    """Other tokens may be far likelier, in every position."""
    rows, _ = recall_rows(FILLER, 64, SYMBOLS)

    def logits(tokens, count):
        assert count == 16 and tokens.shape[1] == 64
        result = np.zeros((len(tokens), count, 300))
        np.put_along_axis(result, rows[:, -count:, None], 1.0, axis=2)
        result[:, :, 290] = 9.0
        return result

    hits = found(
        logits,
        rows,
        SYMBOLS.values,
        count=16,
        step=2,
        tokens_per_batch=10**6,
        progress=lambda count: None,
    )
    assert hits.shape == (6, 8) and hits.all()


def test_shortest_lengths_leave_as_much_text():
    assert shortest("needle", SYMBOLS) == 4 * (len(CUE) + 5)
    assert shortest("recall", SYMBOLS) == 64


def test_tokenizers(tmp_path):
    assert SYMBOLS.values.tolist() == list(b"0123456789")
    assert SYMBOLS.keys.tolist() == list(range(97, 123))
    texts = ["the key is 12 34 12 12 the the ab ab ab"] * 9
    train_bpe(iter(texts), 280, tmp_path / "bpe.json")
    bpe = load_tokenizer_file(tmp_path / "bpe.json")
    symbols = symbols_of(bpe.encode_batch)
    assert bpe.decode(symbols.values) == "0123456789" and bpe.decode(symbols.cue) == CUE
    train_words(iter(texts), 20, tmp_path / "words.json")
    reason = symbols_of(load_tokenizer_file(tmp_path / "words.json").encode_batch)
    assert reason == "the tokenizer has no token of its own for each digit and letter"
