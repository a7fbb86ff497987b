"""Planted models go through every protocol, and the verdict finds what was planted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from alibi_jax.data.tokenizers import ByteTokenizer
from alibi_jax.errors import UserError
from alibi_jax.evaluation import EvaluationConfig, judgement, longest_windows, write_json
from alibi_jax.evaluation.assess import PROTOCOLS, assess
from alibi_jax.evaluation.html import page
from alibi_jax.evaluation.html.read import read
from alibi_jax.evaluation.ngrams import NAMES
from alibi_jax.evaluation.panels import evaluation_figure
from alibi_jax.evaluation.tables import evaluation_table
from tests.evaluation.oracles import (
    base,
    copies,
    explodes,
    layers_of,
    remembers_pairs,
    scorer,
    uses,
)

TRAINED = 64
LENGTHS = (64, 128, 256, 512, 1024)
CONFIG = EvaluationConfig(
    num_windows=8, num_targets=16, num_trials=12, tokens_per_batch=2048, num_bootstrap=200
)


@dataclasses.dataclass
class Split:
    """Tokenized documents."""

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def token_bytes(self):
        """One a token."""
        return np.ones_like(self.tokens)


def split_of(*lengths):
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # Letters whose range differs between documents, so that their losses do.
    low = np.repeat(rng.integers(97, 110, len(lengths)), lengths)
    return Split(low + rng.integers(0, 12, offsets[-1]), offsets)


BOOKS = split_of(1030, 2100, 1025, 1500, 1100, 1800)
OTHER = np.arange(3000) % 48  # no letter: its n-grams know nothing of the books


def evaluate(model, split=BOOKS, training=OTHER, lengths=LENGTHS, config=CONFIG, **kwargs):
    return assess(
        model,
        split,
        training,
        ByteTokenizer(),
        config,
        train_length=TRAINED,
        lengths=lengths,
        packing="documents",
        **kwargs,
    )


@pytest.fixture(scope="module")
def found():
    return evaluate(scorer())


def test_the_verdict_finds_what_was_planted(found):
    verdict = found["verdict"]
    assert verdict["holds_to"] == 1024 and verdict["holds_to_interval"] == [1024, 1024]
    assert verdict["uses_context_to"] == 64 and verdict["uses_context_to_interval"] == [64, 64]
    assert verdict["retrieves_to"] == 1024 and verdict["retrieves_to_interval"] == [1024, 1024]
    assert verdict["text"] == (
        "Holds to at least 1024 tokens [1024, 1024] (paired, within 1%), uses context to 64 tokens "
        "[64, 64], retrieves to at least 1024 tokens [1024, 1024]."
    )
    assert verdict["holds_to_protocol"] == "fixed_targets"
    assert verdict["uses_context_to_protocol"] == "truncated_input"
    assert verdict["layer_window"] == 64 and verdict["layer_window_protocol"] == "truncation"
    assert verdict["retrieves_to_protocol"] == "needle"
    # The nonoverlapping curve falls, by fewer tokens with little context alone.
    assert "nonoverlapping windows alone would mislead: at 1024" in verdict["warning"]
    assert "-" in verdict["warning"].split("loss changes by")[1][:3]


def test_every_protocol_is_there_and_is_json(found, tmp_path):
    assert tuple(found["protocols"]) == PROTOCOLS
    assert found["left_out"] == []
    write_json(found, tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    lines = evaluation_table(found).splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(evaluation_table(found).split())
    assert text.count("7 windows of 1024 tokens from 6 documents; 0.0% of the tokens are in ") == 1
    assert text.count("training text. Intervals are wide, of only 6 documents.") == 1
    assert text.endswith(f"{found['verdict']['text']} Warning: {found['verdict']['warning']}")


def test_what_is_there_is_not_measured_again(found):
    """Whatever was kept when it was stopped, the rest completes it to the same numbers."""
    states = []
    evaluate(scorer(), wanted=("needle", "truncation", "fixed_targets"), keep=states.append)
    assert [len(state["protocols"]) for state in states] == [1, 2, 3]
    assert states[0]["verdict"]["holds_to"] == 1024
    assert states[0]["verdict"]["uses_context_to"] is None

    def forbidden(tokens, window):
        raise AssertionError("truncation is there")

    assert evaluate(scorer(), earlier=states[1]) == found
    assert evaluate(scorer(forbidden), earlier=found) == found
    again = evaluate(scorer(forbidden), earlier=states[1], wanted=("needle",))
    assert again["verdict"] == states[2]["verdict"]


def test_what_is_left_out_stays_said_and_attention_is_read_as_far_as_it_can_be():
    """In one go or in two the lines are the same; with more at once attention is read again."""
    short = dataclasses.replace(CONFIG, tokens_per_batch=128)
    options = {"lengths": (64, 128), "wanted": ("sliding_window", "attention_mass", "recall")}
    whole = evaluate(scorer(), config=short, **options)
    assert [line.split()[0] for line in whole["left_out"]] == ["sliding_window"]
    part = evaluate(scorer(), config=short, **options | {"wanted": options["wanted"][:2]})
    rest = options | {"wanted": ("recall",)}
    assert evaluate(scorer(), config=short, earlier=part, **rest) == whole
    far = {"lengths": (64, 128, 256), "wanted": ("attention_mass",)}
    near = evaluate(scorer(), config=short, **far)
    assert near["protocols"]["attention_mass"]["length"] == 128
    assert "is of 128 tokens, not 256" in near["left_out"][0]
    assert evaluate(scorer(), config=short, earlier=near, **far) == near
    again = evaluate(scorer(), earlier=near, **far)
    assert again["protocols"]["attention_mass"]["length"] == 256 and again["left_out"] == []


def test_a_model_that_learned_too_little_is_not_judged(tmp_path):
    """Nor praised for its use of context, however it is asked, in one go or in two."""
    dead = scorer(lambda tokens, window: base(tokens) * 0 + math.log(257))
    own = BOOKS.tokens  # whose trigrams are far better
    wanted = ("fixed_targets", "truncated_input", "truncation")
    found = evaluate(dead, training=own, wanted=wanted)
    verdict = found["verdict"]
    assert verdict["text"] == (
        "Learned too little for a verdict: not clearly better than trigrams of the training text."
    )
    for name in ("holds_to", "uses_context_to", "layer_window"):
        assert verdict[name] is None and verdict[f"{name}_interval"] is None
    part = evaluate(dead, training=own, wanted=wanted[1:])
    assert "(compared with n-grams only by fixed_targets)" in part["verdict"]["text"]
    assert evaluate(dead, training=own, wanted=wanted, earlier=part) == found
    shown = evaluation_table(found)
    for name, floor in zip(NAMES.values(), verdict["floors"]["fixed_targets"], strict=True):
        assert f"{name} {floor['bits_per_byte']:>10.4f}" in shown
    write_json(found, tmp_path / "evaluation.json")


def broken(beyond):
    """A model that gives nan wherever a row has more tokens than this."""
    whole = scorer()

    def of(function, rows):
        return lambda tokens, *args: np.where(
            rows(tokens) > beyond, np.nan, function(tokens, *args)
        )

    return whole._replace(
        losses=of(whole.losses, lambda tokens: tokens.shape[1] - 1),
        logits=of(whole.logits, lambda tokens: tokens.shape[1]),
        attention_mass=of(whole.attention_mass, lambda tokens: tokens.shape[1]),
    )


@pytest.mark.parametrize("beyond", [0, 256])
def test_nan_is_seen_everywhere_and_ends_in_the_verdict(beyond, tmp_path):
    found = evaluate(broken(beyond))
    write_json(found, tmp_path / "evaluation.json")  # which refuses nan
    protocols = found["protocols"]
    for name, level in (("fixed_targets", "nats_per_token"), ("needle", "accuracy")):
        for entry in protocols[name]["entries"] if name == "needle" else protocols[name]:
            assert (entry[level] is None) == (entry["length"] > beyond)
    assert all(head["keys"] == [None] * 3 for head in protocols["attention_mass"]["heads"])
    text, shown = found["verdict"]["text"], evaluation_table(found)
    if beyond:
        assert (
            "Holds to 256 tokens [256, 256] (paired, within 1%), is not finite at 512 and" in text
        )
        assert "retrieves to 256 tokens [256, 256]." in text
        assert shown.count("not finite") > 10
        assert (
            "It does not hold at 512 tokens: on the same targets it is not finite. At 1024"
            in (found["verdict"]["details"])
        )
    else:
        assert text == (
            "The loss at the training length is not finite, retrieves from no length reliably."
        )
        assert found["verdict"]["uses_context_to"] is None
    evaluation_figure(found, tmp_path / "evaluation.png")
    found |= {"versions": {}, "config": {"model": {"position": "alibi"}}}
    (tmp_path / "config.json").write_text("{}")
    write_json(found, tmp_path / "evaluation.json")
    assert "not finite" in page(*read([tmp_path]))


@pytest.mark.parametrize("reach", [64, 128, 256])
def test_truncated_on_purpose_is_found_to_use_so_much(reach):
    verdict = evaluate(scorer(uses(reach)), wanted=("truncated_input",))["verdict"]
    assert verdict["uses_context_to"] == reach and verdict["layer_window"] is None
    assert verdict["holds_to"] is None and verdict["retrieves_to"] is None
    assert verdict["text"] == (
        f"Uses context to {reach} tokens [{reach}, {reach}] (compared with n-grams only by "
        "fixed_targets)."
    )


@pytest.mark.parametrize(("layers", "expected"), [(1, 64), (2, 128), (3, 256)])
def test_layers_of_a_window_use_an_input_as_long_as_all_of_them(layers, expected):
    """N windows of 64 keys reach 63 N tokens back: with the token itself 64, 127 and 190."""
    found = evaluate(scorer(layers_of(64, layers)), wanted=("truncated_input", "truncation"))
    assert found["verdict"]["layer_window"] == 64
    assert found["verdict"]["layer_window_interval"] == [64, 64]
    assert found["verdict"]["uses_context_to"] == expected
    assert found["verdict"]["uses_context_to_interval"] == [expected, expected]
    table = evaluation_table(found)
    assert f"Uses context to {expected} tokens" in table
    assert "No layer needs more than its nearest 64 keys [64, 64]." in table


def test_a_truncated_input_has_little_less_context_than_it_says(found):
    entries = found["protocols"]["truncated_input"]
    assert [entry["context"] for entry in entries] == [32, 64, 128, 256, 512, 1024]
    assert [entry["least_context"] for entry in entries] == [31, 61, 121, 241, 497, 1009]
    # 0.05 nats for each doubling to 64 tokens.
    seen = {32: np.arange(31, 33), 64: np.arange(61, 65)}
    for entry in entries:
        lost = 0.05 * (6 - np.log2(seen.get(entry["context"], 64)).mean())
        assert entry["change"] == pytest.approx(lost, abs=1e-6)
    # The targets are those of the fixed targets at the longest length.
    fixed = found["protocols"]["fixed_targets"][-1]
    assert entries[-1]["nats_per_token"] == pytest.approx(fixed["nats_per_token"], rel=1e-6)


@pytest.mark.parametrize(("gain", "expected"), [(0.004, 64), (0.006, 1024)])
def test_context_that_gains_half_a_percent_is_used(gain, expected):
    def losses(tokens, window):
        return uses(64)(tokens, window) * (1 if window is None else 1 + gain)

    verdict = evaluate(scorer(losses), wanted=("truncation",))["verdict"]
    assert verdict["layer_window"] == expected


def test_windows_that_all_lose_to_a_shorter_one_are_not_used():
    """Full context is worst: what counts is where a longer window stops helping."""

    def losses(tokens, window):
        return uses(64)(tokens, window) + (1.0 if window is None or window > 128 else 0.0)

    assert evaluate(scorer(losses), wanted=("truncation",))["verdict"]["layer_window"] == 64


def test_an_exploding_loss_does_not_hold():
    found = evaluate(scorer(explodes(TRAINED)))
    verdict = found["verdict"]
    assert verdict["holds_to"] == TRAINED and verdict["holds_to_interval"] == [64, 64]
    assert verdict["warning"] is None
    assert verdict["text"].startswith(
        "Holds to 64 tokens [64, 64] (paired, within 1%), uses context to at most 32 tokens "
        "[32, 32], retrieves to at least 1024"
    )
    rising = [entry["relative_change"] for entry in found["protocols"]["fixed_targets"]]
    assert all(np.diff(rising) > 0.1)


def test_infinities_are_null_and_no_crash(tmp_path):
    def losses(tokens, window):
        return np.where(np.arange(1, tokens.shape[1])[None] > 100, np.inf, 2.0) * np.ones(
            (len(tokens), 1)
        )

    found = evaluate(scorer(losses))
    write_json(found, tmp_path / "evaluation.json")
    verdict = found["verdict"]
    assert verdict["holds_to"] == TRAINED
    assert verdict["layer_window"] is None and verdict["uses_context_to"] == 32
    assert found["protocols"]["by_position"]["entries"][-1]["nats_per_token"] is None
    assert "not finite" in evaluation_table(found)


@pytest.mark.parametrize(("reach", "expected"), [(10**9, 1024), (300, 256), (100, 64), (20, 0)])
def test_a_copy_task_is_retrieved_to_its_range(reach, expected):
    found = evaluate(scorer(logits=copies(reach)), wanted=("needle",))
    assert found["verdict"]["retrieves_to"] == expected
    assert found["verdict"]["retrieves_to_interval"] == [expected, expected]
    for entry in found["protocols"]["needle"]["entries"]:
        # Cue and needle are within reach, or nothing is.
        if entry["distance"] + 3 <= reach:
            assert entry["accuracy"] == 1
        elif entry["distance"] > reach + 5:
            assert entry["accuracy"] < 0.5


@pytest.mark.parametrize(("reach", "expected"), [(10**9, 1024), (300, 256)])
def test_recall_reaches_its_range(reach, expected):
    found = evaluate(scorer(logits=remembers_pairs(reach)), wanted=("recall",))
    assert found["verdict"]["recalls_to"] == expected
    assert [entry["accuracy"] == 1 for entry in found["protocols"]["recall"]["entries"]] == [
        length <= expected for length in LENGTHS
    ]


def test_a_model_that_reads_nothing_is_right_by_chance():
    def logits(tokens, count):
        rng = np.random.default_rng(tokens.sum())
        return rng.normal(size=(len(tokens), count, 257))

    config = dataclasses.replace(CONFIG, num_trials=100)
    found = evaluate(
        scorer(logits=logits), lengths=(64,), config=config, wanted=("needle", "recall")
    )
    for task in ("needle", "recall"):
        entries = found["protocols"][task]["entries"]
        accuracy = np.mean([entry["accuracy"] for entry in entries])
        total = len(entries) * 100 * found["protocols"][task]["num_symbols"]
        assert accuracy == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / total))
        assert found["protocols"][task]["chance"] == 0.1
    assert found["verdict"]["retrieves_to"] == 0
    assert "etrieves from no length reliably" in found["verdict"]["text"]


def test_attention_of_the_slope_alone_has_the_slopes_quantiles(found):
    mass = found["protocols"]["attention_mass"]
    assert mass["length"] == 1024 and mass["quantiles"] == [0.5, 0.9, 0.99]
    assert [(head["layer"], head["head"]) for head in mass["heads"]] == [
        (layer, head) for layer in range(3) for head in range(2)
    ]
    for head in mass["heads"]:
        slope = (0.5, 1 / 64)[head["head"]]
        assert head["slope"] == slope
        for p, keys, expected in zip(
            mass["quantiles"], head["keys"], head["slope_keys"], strict=True
        ):
            assert expected == math.ceil(math.log(1 - p) / -slope)
            # Edges are a quarter octave apart.
            assert keys == pytest.approx(math.log(1 - p) / -slope, rel=0.05, abs=0.3)


def test_a_sink_is_part_of_what_the_bias_alone_has():
    """With slope 1/2 the sink has 1 / (1 + 2.54) of all attention: 28%, so that 90% need all keys.

    With slope 1/64 it has 1.5%, and 99% need all keys.
    """
    mass = evaluate(scorer(sink=True), wanted=("attention_mass",))["protocols"]["attention_mass"]
    assert mass["sink"]
    steep, flat = mass["heads"][:2]
    assert steep["slope_keys"] == [3, 1024, 1024]
    assert flat["slope_keys"][2] == 1024 > flat["slope_keys"][1] > math.log(10) * 64
    for head in (steep, flat):
        # Edges are a quarter octave apart, and the sink is beyond the last.
        for keys, expected in zip(head["keys"], head["slope_keys"], strict=True):
            assert expected / 2**0.25 - 1 <= keys <= 1.05 * expected + 0.3


def test_attention_is_read_at_the_longest_length_that_is_computed_at_once_and_says_so():
    said = []
    config = dataclasses.replace(CONFIG, tokens_per_batch=300)
    found = evaluate(scorer(), config=config, wanted=("attention_mass",), say=said.append)
    assert found["protocols"]["attention_mass"]["length"] == 256
    assert found["left_out"] == said and len(said) == 1
    assert said[0].startswith(
        "attention_mass is of 256 tokens, not 1024: it reads a window at once"
    )


def test_sliding_windows_score_the_same_targets_with_little_less_context(found):
    entries = found["protocols"]["sliding_window"]
    assert [entry["length"] for entry in entries] == [64, 128, 256, 512]
    assert [entry["stride"] for entry in entries] == [16, 32, 64, 128]
    assert [entry["cost"] for entry in entries] == [4, 4, 4, 4]
    # All targets have at least 48 of the 64 tokens that help.
    bound = 0.05 * math.log2(64 / 48)
    assert -bound <= entries[-1]["change"] <= 0


def test_loss_by_position_is_that_of_the_oracle(found):
    by_position = found["protocols"]["by_position"]
    entries = by_position["entries"]
    assert by_position["length"] == 1024
    assert entries[0]["start"] == 0 and entries[-1]["stop"] == 1024
    assert TRAINED in [entry["start"] for entry in entries]
    first = entries[0]["nats_per_token"]
    assert first - entries[-1]["nats_per_token"] == pytest.approx(0.05 * 6, abs=0.15)
    assert [(a["stop"], a["length"]) for a in entries if a["stop"] in LENGTHS] == [
        (length, length) for length in LENGTHS
    ]


def test_early_positions_are_means_over_all_tiles_of_the_shortest_length(found):
    """7 windows of 1024 tokens are 112 tiles of 64, so a position is that of 112 texts."""
    text = longest_windows(BOOKS, longest=1024, num_windows=8, packing="documents").tokens[:, 1:]
    cost = (2 + (text % 50) / 50).reshape(7, -1)
    for entry in found["protocols"]["by_position"]["entries"]:
        start, stop, length = entry["start"], entry["stop"], entry["length"]
        assert length == min(n for n in LENGTHS if n >= stop)
        places = [at for at in range(1024) if start <= at % length < stop]
        gained = 0.05 * np.log2(np.minimum(1 + np.array(places) % length, 64))
        expected = (cost[:, places] - gained).mean()
        assert entry["num_tokens"] == 7 * len(places)
        assert entry["nats_per_token"] == pytest.approx(expected, rel=1e-6)
        assert entry["interval"][0] < expected < entry["interval"][1]


def test_the_curve_by_position_has_no_noise_of_the_text_at_the_training_length():
    """Every sixteenth stretch of 64 tokens is cheap, at the same place in each longest window."""
    place = np.arange(16 * 1025) % 1025
    cheap = Split(np.where((place - 1) // 64 == 0, 100, 149), np.arange(17) * 1025)
    model = scorer(lambda tokens, window: base(tokens))
    config = dataclasses.replace(CONFIG, num_windows=16)
    entries = evaluate(model, cheap, config=config, wanted=("by_position",))["protocols"][
        "by_position"
    ]["entries"]
    within = [entry["nats_per_token"] for entry in entries if entry["stop"] <= 64]
    assert np.ptp(within) < 1e-6
    # One tile of sixteen is cheap: 2 nats in place of 2.98.
    assert within[0] == pytest.approx((2 + 15 * 2.98) / 16, rel=1e-6)


def test_what_the_data_cannot_serve_is_left_out_with_a_reason():
    said = []
    short = split_of(150, 140, 90)
    found = evaluate(scorer(), short, say=said.append)
    assert [entry["length"] for entry in found["protocols"]["fixed_targets"]] == [64, 128]
    assert said == found["left_out"]
    assert "left out: 256, 512, 1024" in said[0]
    assert said[1].startswith("sliding_window left out: its targets are the second half")
    assert "sliding_window" not in found["protocols"]
    assert found["verdict"]["holds_to"] == 128


def test_nothing_left_to_evaluate_is_refused():
    with pytest.raises(UserError, match=r"nothing is left to evaluate: .*second half"):
        evaluate(scorer(), split_of(150, 140), wanted=("sliding_window",))


def test_one_document_has_a_verdict_without_intervals():
    found = evaluate(scorer(), split_of(3000))
    assert found["verdict"]["holds_to_interval"] is None
    assert found["verdict"]["uses_context_to_interval"] is None
    assert "uses context to 64 tokens, " in found["verdict"]["text"]
    assert found["verdict"]["warning"] is None


def test_it_is_deterministic(found):
    assert evaluate(scorer()) == found


def test_changes_by_length_are_those_of_the_oracle(found):
    """Fixed targets have 49 to 64 keys at the training length, and 64 beyond; others have fewer."""
    seen = np.arange(1, 1025)
    nats = -0.05 * np.log2(np.minimum(seen, 64))
    for length, fixed, whole in zip(
        LENGTHS,
        found["protocols"]["fixed_targets"],
        found["protocols"]["nonoverlapping"],
        strict=True,
    ):
        expected = nats[length - 16 : length].mean() - nats[48:64].mean()
        assert fixed["change"] == pytest.approx(expected, abs=1e-6)
        expected = nats[:length].mean() - nats[:64].mean()
        assert whole["change"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([32, 32], "at most 32 tokens"),
        ([32, 128], "Uses context to 32 tokens [32, 128]."),
        (None, "at most 32 tokens."),
    ],
)
def test_a_bound_is_not_claimed_against_its_own_interval(interval, words):
    judged = {
        "learned": True,
        "holds_to": None,
        "uses_context_to": 32,
        "uses_context_to_interval": interval,
        "retrieves_to": None,
    }
    assert words in judgement.sentence(judged, 1024)


def test_at_least_is_said_only_where_the_interval_agrees():
    judged = {"learned": True, "uses_context_to": None, "retrieves_to": None, "holds_to": 1024}
    assert "to at least" in judgement.sentence(judged | {"holds_to_interval": [1024, 1024]}, 1024)
    assert "at least" not in judgement.sentence(judged | {"holds_to_interval": [512, 1024]}, 1024)
