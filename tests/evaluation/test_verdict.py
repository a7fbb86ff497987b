"""The verdict claims no more than its intervals carry."""

import pytest

from alibi_jax.evaluation.verdict import percent, verdict

TRAIN_NATS = 2.0


def entry(length, change=0.0, interval=(0.0, 0.0)):
    """One length whose loss changes by so many nats from 2.0."""
    bounds = None if interval is None else list(interval)
    return {
        "length": length,
        "nats_per_token": TRAIN_NATS + change,
        "interval": [1.9, 2.1],
        "bits_per_byte": 1.0,
        "change": change,
        "change_interval": bounds,
        "relative_change": change / TRAIN_NATS,
        "relative_change_interval": bounds and [bound / TRAIN_NATS for bound in bounds],
    }


def floor(n, above, interval):
    """N-grams whose loss is above the model's by so many nats."""
    return {"n": n, **entry(None, above, interval)}


FAR = [floor(n, 4 - n, (3.9 - n, 4.1 - n)) for n in (1, 2, 3)]


def judge(fixed, nonoverlapping=None, num_documents=10, floors=FAR, overlap=0.0):
    """Judge 128 (the training length), 256, ... from changes and their intervals."""
    nonoverlapping = nonoverlapping or fixed
    rows = [
        [entry(128), *(entry(256 * 2**i, *change) for i, change in enumerate(changes))]
        for changes in (nonoverlapping, fixed)
    ]
    return verdict(*rows, floors, unit="document", num_documents=num_documents, overlap=overlap)


def test_a_length_above_a_failing_one_does_not_count():
    result = judge([(0.0, (0, 0)), (0.5, (0.4, 0.6)), (0.0, (0, 0))])
    assert result["holds_to"] == 256
    assert "does not hold at 512 tokens" in result["text"]


@pytest.mark.parametrize(
    ("change", "holds"), [(0.0199, True), (0.0201, False), (-0.5, True), (0.02, True)]
)
def test_one_percent_is_the_line(change, holds):
    assert (judge([(change, (change, change))])["holds_to"] == 256) == holds


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.004, 0.008), "no measurable gain from longer context"),
        ((0.001, 0.008), "no gain from longer context"),
        ((-0.008, -0.001), ", a gain from longer context"),
        ((-0.004, 0.03), "reaches above +1%, so this is not certain"),
    ],
)
def test_what_an_interval_allows_to_say(interval, words):
    assert words in judge([(sum(interval) / 2, interval)])["text"]


def test_a_failure_within_noise_says_so():
    assert "though the interval reaches below +1%" in judge([(0.03, (0.01, 0.05))])["text"]
    assert "though" not in judge([(0.03, (0.021, 0.05))])["text"]


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ((0.001, (-0.00041, 0.002)), "at most 0.0005 is longer context; the rest is fewer"),
        ((-0.01, (-0.012, -0.008)), "at most 0.0120 is longer context; the rest is fewer"),
        ((0.001, (0.0005, 0.002)), "none is longer context; the rest is fewer"),
        # Too wide an interval, or too large a gain, to say that early tokens explain anything.
        ((0.0, (-0.05, 0.05)), "Longer context could explain all of the 0.0400 nats"),
        ((-0.06, (-0.07, -0.05)), "Longer context could explain all of the 0.0400 nats"),
    ],
)
def test_the_part_of_longer_context_is_a_bound(fixed, words):
    assert words in judge([fixed], [(-0.04, (-0.045, -0.035))])["text"]


def test_no_gain_of_nonoverlapping_windows_is_left_unexplained():
    assert "nonoverlapping" not in judge([(0, (0, 0))], [(-0.01, (-0.03, 0.01))])["text"]


def test_one_document_claims_no_gain():
    text = judge([(-0.01, None)], num_documents=1)["text"]
    assert "changes by -0.50%." in text
    assert "gain" not in text


@pytest.mark.parametrize(("num_documents", "few"), [(2, True), (9, True), (10, False)])
def test_few_documents_are_named_once(num_documents, few):
    text = judge([(0, (0, 0))], num_documents=num_documents)["text"]
    assert text.count(f"only {num_documents} documents") == few


@pytest.mark.parametrize(("overlap", "said"), [(0.19, False), (0.2, True)])
def test_much_text_that_training_has_as_well_is_named(overlap, said):
    words = f"{overlap:.0%} of the tokens stand in the training text as well"
    assert (words in judge([(0, (0, 0))], overlap=overlap)["text"]) == said


@pytest.mark.parametrize(
    ("floors", "named"),
    [
        (FAR, None),
        ([floor(1, 2, (1, 3)), floor(2, 1, (0.5, 1.5)), floor(3, -1, (-1.5, -0.5))], "trigrams"),
        ([floor(1, 2, (1, 3)), floor(2, 0.1, (-0.1, 0.3)), floor(3, 0.3, (0.1, 0.5))], "bigrams"),
        # The best is named, not the one that is least sure.
        ([floor(1, -1, (-9, 7)), floor(2, -2, (-9, 5)), floor(3, -3, (-4, -2))], "trigrams"),
        ([floor(3, 0.1, None)], None),  # one document: no interval, and it says so
        ([floor(3, -0.1, None)], "trigrams"),
    ],
)
def test_what_is_not_clearly_better_than_every_n_gram_is_not_judged(floors, named):
    result = judge([(0.0, (0, 0))], floors=floors)
    assert result["learned"] == (named is None)
    assert result["holds_to"] == (None if named else 256)
    assert ("holds" in result["text"]) == (named is None)
    if named:
        assert (
            f"learned too little for a verdict: not clearly better than {named}" in (result["text"])
        )


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0005, "+0.05%"), (-0.1234, "-12.3%"), (43.1, "+4,310%"), (-1e-9, "+0.00%")],
)
def test_percent(fraction, text):
    assert percent(fraction) == text
