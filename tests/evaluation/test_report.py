"""Planted losses, whose verdict is known, go through the whole report."""

import json
import math
import types

import jax
import numpy as np
import pytest

from alibi_jax.data.tokenizers import ByteTokenizer
from alibi_jax.evaluation import Windows, evaluate, summarize, table, versions, write_json
from alibi_jax.evaluation.ngrams import NgramLosses
from alibi_jax.evaluation.windows import supported_lengths

LENGTHS = (16, 32, 64, 128)
NUM_TARGETS = 8


def windows_of(num_documents=10, per_document=2):
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(num_documents), per_document)
    # Documents differ in the tokens that they use, so in their loss.
    low = rng.integers(0, 50, num_documents)[document][:, None]
    tokens = low + rng.integers(0, 50, (len(document), LENGTHS[-1] + 1))
    token_bytes = rng.integers(0, 9, tokens.shape)
    return Windows(tokens.astype(np.int32), document, "document", token_bytes)


def unigram(tokens):
    """Cost between 1 and 3 nats, set by the token alone: no context changes it."""
    return 1 + tokens[:, 1:].astype(np.float32) / 50


def position(tokens):
    return np.arange(1, tokens.shape[1], dtype=np.float32)  # tokens of context, from 1


def early_tokens(tokens):
    """Cost more near the window's start; from 8 tokens of context on nothing changes."""
    return unigram(tokens) + np.maximum(0, 8 - position(tokens)).astype(np.float32) / 4


def explodes(tokens):
    return early_tokens(tokens) + np.maximum(0, position(tokens) - 16)


def holds_to_64(tokens):
    return early_tokens(tokens) + np.maximum(0, position(tokens) - 64)


def uses_context(tokens):
    return unigram(tokens) - np.log(position(tokens)) / 10


def not_finite_beyond_32(tokens):
    return early_tokens(tokens) + np.where(position(tokens) > 32, np.inf, 0).astype(np.float32)


def report(loss_fn, windows=None, lengths=LENGTHS, floor=9.0, left_out=()):
    """The report of a model, and of n-grams that cost so many nats for every token, or more."""
    windows = windows or windows_of()
    losses = evaluate(loss_fn, windows, lengths, tokens_per_batch=512)
    ngrams = {n: np.full(losses[lengths[0]].shape, floor + 3 - n) for n in (1, 2, 3)}
    return summarize(
        losses,
        NgramLosses(ngrams, 10**6),
        windows,
        {"ngram": 13, "share": 0.05, "num_searched": 10**6},
        train_length=lengths[0],
        num_targets=NUM_TARGETS,
        tokenizer=ByteTokenizer(),
        num_bootstrap=500,
        left_out=left_out,
    )


def text(loss_fn, **kwargs):
    return report(loss_fn, **kwargs)["verdict"]["text"]


def test_losses_that_no_context_changes_equal_numpy_by_hand():
    windows = windows_of()
    summary = report(unigram, windows)
    nats = 1 + windows.tokens[:, 1:].astype(np.float64) / 50
    assert summary["bytes_per_token"] == windows.token_bytes[:, 1:].mean()
    for name, count in (("nonoverlapping", nats.shape[1]), ("fixed_targets", NUM_TARGETS)):
        values, num_bytes = nats[:, -count:], windows.token_bytes[:, -count:].sum()
        for entry in summary["protocols"][name]:
            assert entry["nats_per_token"] == pytest.approx(values.mean(), rel=1e-6)
            # Each protocol has the bytes of its own targets.
            bits = values.sum() / math.log(2) / num_bytes
            assert entry["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
            assert entry["bits_per_byte_interval"][0] < bits < entry["bits_per_byte_interval"][1]
            assert entry["bytes_per_token"] == num_bytes / values.size
            assert entry["perplexity"] == pytest.approx(math.exp(values.mean()), rel=1e-6)
            low, high = entry["interval"]
            assert low < values.mean() < high
            assert entry["change"] == entry["relative_change"] == 0
            assert entry["change_interval"] == entry["relative_change_interval"] == [0, 0]


def test_the_share_of_bytes_that_no_word_stands_for():
    windows = windows_of()
    assert windows.unknown_bytes(None) == 0
    pairs = zip(windows.tokens[:, 1:].ravel(), windows.token_bytes[:, 1:].ravel(), strict=True)
    known = sum(int(num_bytes) for token, num_bytes in pairs if token != 60)
    share = 1 - known / windows.token_bytes[:, 1:].sum()
    assert windows.unknown_bytes(60) == pytest.approx(share) and 0 < share < 0.1


def test_words_have_a_perplexity():
    """That of WikiText: exp of all nats over all words, the ends of lines among them."""
    summary = report(unigram) | {"word_level": True, "unknown_bytes": 0.125}
    losses = 1 + windows_of().tokens[:, 1:].astype(np.float64) / 50
    perplexity = math.exp(losses.sum() / losses.size)
    lines = table(summary).splitlines()
    assert lines[1].split().count("ppl") == 2 and "bits/byte" not in lines[1]
    assert lines[2].split()[2] == f"{perplexity:.2f}"
    assert "12.5% of the bytes are of what the vocabulary lacks" in table(summary)
    assert "vocabulary" not in table(report(unigram))


def test_fewer_early_tokens_are_no_gain_from_longer_context():
    summary = report(early_tokens)
    changes = [entry["change"] for entry in summary["protocols"]["nonoverlapping"]]
    # Press et al.'s curve: it falls with length although nothing beyond 8 tokens matters. The
    # extra 7 + 6 + ... + 1 quarters of a nat fall on every tile once.
    np.testing.assert_allclose(changes, [7 / n - 7 / 16 for n in LENGTHS], rtol=1e-5)
    assert all(entry["change"] == 0 for entry in summary["protocols"]["fixed_targets"])
    verdict = summary["verdict"]
    assert verdict["holds_to"] == verdict["compared_at"] == 128
    assert verdict["holds_factor"] == 8
    assert "holds to 128 tokens (the longest evaluated), 8x the training length" in verdict["text"]
    assert "no measurable gain from longer context" in verdict["text"]
    assert (
        "Of the 0.3828 nats per token that nonoverlapping windows gain, none is longer context"
        in verdict["text"]
    )


def test_a_loss_that_rises_at_once_does_not_hold():
    verdict = report(explodes)["verdict"]
    assert verdict["holds_to"] == 16
    assert verdict["holds_factor"] == 1
    assert verdict["compared_at"] == 32
    # Positions 25..32 are 9..16 beyond the training length.
    assert verdict["fixed_targets_change"] == pytest.approx(12.5)
    assert "does not hold beyond the training length of 16 tokens: at 32," in verdict["text"]
    assert "gain" not in verdict["text"]


def test_a_loss_that_holds_and_then_rises_says_both():
    verdict = report(holds_to_64)["verdict"]
    assert verdict["holds_to"] == 64
    assert "holds to 64 tokens, 4x the training length" in verdict["text"]
    assert "It does not hold at 128 tokens: on the same targets it changes by +" in verdict["text"]


def test_a_gain_from_longer_context_is_seen():
    verdict = report(uses_context)["verdict"]
    assert verdict["holds_to"] == 128
    expected = -(np.log(np.arange(121, 129)).mean() - np.log(np.arange(9, 17)).mean()) / 10
    assert verdict["fixed_targets_change"] == pytest.approx(expected, rel=1e-4)
    assert ", a gain from longer context." in verdict["text"]
    assert "no gain" not in verdict["text"]


def test_infinities_do_not_hold_and_leave_valid_json(tmp_path):
    summary = report(not_finite_beyond_32)
    assert summary["verdict"]["holds_to"] == 32
    assert "at 64 tokens: on the same targets it is not finite" in summary["verdict"]["text"]
    assert summary["protocols"]["fixed_targets"][2]["nats_per_token"] is None
    write_json(summary, tmp_path / "out.json")
    assert "not finite" in table(summary)


def test_a_model_that_diverged_in_training_gets_no_praise():
    assert "training length of 16 tokens is not finite" in text(lambda t: unigram(t) * np.nan)


def test_a_dead_model_gets_no_praise_and_the_floors_stand_beside_it():
    """A loss of ln 257 everywhere holds at every length; n-grams of 2 nats do not."""
    summary = report(lambda tokens: unigram(tokens) * 0 + np.log(257), floor=2.0)
    verdict = summary["verdict"]
    assert verdict["learned"] is False and verdict["closest_ngram"] == 3
    assert verdict["holds_to"] is None and verdict["holds_factor"] is None
    assert "learned too little for a verdict" in verdict["text"] and "holds" not in verdict["text"]
    of_protocols = [verdict["floors"][name] for name in ("nonoverlapping", "fixed_targets")]
    for floors in of_protocols:
        for floor, nats in zip(floors, (4, 3, 2), strict=True):
            assert floor["nats_per_token"] == pytest.approx(nats)
            bits = nats / math.log(2) / floor["bytes_per_token"]
            assert floor["bits_per_byte"] == pytest.approx(bits)
            assert floor["change_interval"] == pytest.approx([nats - np.log(257)] * 2)
    lines = table(summary).splitlines()
    assert [line.split()[0] for line in lines[6:9]] == ["unigrams", "bigrams", "trigrams"]
    bits = [f"{floors[2]['bits_per_byte']:.4f}" for floors in of_protocols]
    assert lines[8].split()[1:3] == bits


def test_a_loss_of_zero_is_no_crash():
    summary = report(lambda tokens: unigram(tokens) * 0)
    assert summary["protocols"]["fixed_targets"][1]["relative_change"] is None


def test_the_training_length_alone_says_nothing_about_longer_ones():
    summary = report(unigram, lengths=(16,))
    assert summary["verdict"]["holds_to"] == 16
    assert "says nothing about longer ones" in summary["verdict"]["text"]


def test_a_length_that_was_asked_for_and_cannot_be_is_named_beside_the_numbers():
    documents = types.SimpleNamespace(tokens=np.arange(300), offsets=np.array([0, 150, 300]))
    lengths, note = supported_lengths(documents, (16, 32, 3200), "documents")
    summary = report(early_tokens, lengths=lengths, left_out=[note])
    assert lengths == (16, 32) and "left out: 3200" in note
    assert summary["left_out"] == [note] and f"{note}." in " ".join(table(summary).split())


def test_one_document_has_no_intervals_and_says_so():
    summary = report(early_tokens, windows_of(1, 20))
    assert summary["num_documents"] == 1
    assert all(entry["interval"] is None for entry in summary["protocols"]["fixed_targets"])
    assert "come from one document, so there are no intervals" in summary["verdict"]["text"]
    assert "gain" not in summary["verdict"]["text"]


def test_json_has_the_contract_and_replaces_what_is_there(tmp_path):
    path = tmp_path / "extrapolation.json"
    path.write_text("old")
    write_json(report(early_tokens), path)
    assert list(tmp_path.iterdir()) == [path]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    loaded = json.loads(path.read_text(), parse_constant=refuse)
    assert loaded["train_length"] == 16
    assert (loaded["num_windows"], loaded["num_documents"]) == (20, 10)
    assert (loaded["num_tokens"], loaded["num_targets"]) == (20 * 128, NUM_TARGETS)
    assert set(loaded["protocols"]) == {"nonoverlapping", "fixed_targets"}
    for entries in loaded["protocols"].values():
        assert [entry["length"] for entry in entries] == list(LENGTHS)
        for entry in entries:
            assert {"nats_per_token", "bits_per_byte", "interval"} <= set(entry)
            assert {"relative_change", "relative_change_interval"} <= set(entry)
            low, high = entry["interval"]
            assert low <= entry["nats_per_token"] <= high
    assert {"text", "holds_to", "holds_factor"} <= set(loaded["verdict"])


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "extrapolation.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_json({"loss": math.nan}, path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("loss_fn", [early_tokens, explodes, uses_context, not_finite_beyond_32])
def test_the_table_fits_and_ends_with_the_verdict(loss_fn):
    summary = report(loss_fn)
    lines = table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[2:6]] == [str(length) for length in LENGTHS]
    assert " ".join(table(summary).split()).endswith(summary["verdict"]["text"])


def test_versions_name_software_and_device():
    found = versions()
    assert found["jax"] == jax.__version__
    assert found["platform"] == "cpu"
    assert all(isinstance(value, str) for value in found.values())
