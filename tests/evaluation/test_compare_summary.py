"""Planted runs, whose comparison is known, go through numbers, tables and figure."""

import json
import math

import matplotlib.image
import numpy as np
import pytest

from alibi_jax.errors import UserError
from alibi_jax.evaluation.compare_figure import comparison_figure, drawn
from alibi_jax.evaluation.compare_statistics import p_value, t_interval
from alibi_jax.evaluation.compare_summary import Run, summarize
from alibi_jax.evaluation.compare_table import comparison_table, findings
from alibi_jax.evaluation.verdict import percent
from alibi_jax.evaluation.windows import Windows
from tests.evaluation.report_files import summarized

LENGTHS = (16, 32, 64)
TEXT = np.random.default_rng(0).gamma(3, size=(10, 64)).astype(np.float32)
DOCUMENT = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 5])


def run(levels, *, documents=DOCUMENT, lengths=LENGTHS, seconds=0.1, context=32):
    """A finished run whose loss at each length is the text's own plus a level."""
    tokens = np.zeros((10, 65), np.int32)
    windows = Windows(tokens, documents, "document", np.full_like(tokens, 2))
    losses = {
        length: TEXT + np.float32(level) for length, level in zip(lengths, levels, strict=True)
    }
    evaluation = summarized(losses, windows, TEXT + 6.0, num_bootstrap=200)
    evaluation["verdict"] |= {"uses_context_to": 32, "retrieves_to": None, "warning": None}
    evaluation["verdict"]["uses_context_to_interval"] = [32, context]
    evaluation["config"] = {"evaluation": {"num_bootstrap": 200, "split": "test"}}
    evaluation |= {"step": 40, "tokens_sha256": "ab"}
    spread = [0.9 * seconds, seconds + 0.2]
    return Run("finished", None, evaluation, seconds, 10**7, 820_000, spread)


# Three methods and three seeds. Seeds shift all methods alike, by much, so only pairs show that
# "better" is better; "breaks" explodes beyond 16 tokens.
SHIFT = {0: -0.3, 1: 0.1, 2: 0.4}
GAIN = {0: -0.05, 1: -0.06, 2: -0.07}


def planted(seeds=(0, 1, 2)):
    runs = {}
    for seed in seeds:
        level = SHIFT[seed]
        runs["breaks", seed] = run([level - 0.1, level + 2, level + 60])
        runs["alibi", seed] = run([level] * 3)
        runs["better", seed] = run([level + GAIN[seed]] * 3, seconds=0.1 + seed, context=32 << seed)
    return runs


METHODS = ("breaks", "alibi", "better")


def entry_of(comparison, name, length, protocol="fixed_targets"):
    (method,) = (m for m in comparison["methods"] if m["name"] == name)
    return next(e for e in method["protocols"][protocol] if e["length"] == length)


@pytest.fixture(scope="module")
def comparison():
    return summarize(METHODS, (0, 1, 2), planted())


@pytest.mark.parametrize("protocol", ["nonoverlapping", "fixed_targets"])
def test_levels_and_paired_differences_are_those_planted(comparison, protocol):
    text = (TEXT if protocol == "nonoverlapping" else TEXT[:, -8:]).astype(np.float64).mean()
    shifts, gains = np.array(list(SHIFT.values())), np.array(list(GAIN.values()))
    for length in LENGTHS:
        entry = entry_of(comparison, "better", length, protocol)
        assert entry["nats_per_token"] == pytest.approx(text + (shifts + gains).mean(), rel=1e-6)
        assert entry["interval"] == pytest.approx(t_interval(text + shifts + gains), rel=1e-5)
        bits = entry["nats_per_token"] / math.log(2) / 2.0
        assert entry["bits_per_byte"] == pytest.approx(bits)
        assert math.log(entry["perplexity"]) == pytest.approx(entry["nats_per_token"])
        assert np.mean(entry["bits_per_byte_seeds"]) == pytest.approx(bits)
        assert entry["difference_seeds"] == pytest.approx(gains, abs=1e-6)
        assert entry["difference_interval"] == pytest.approx(t_interval(gains), abs=1e-5)
        assert entry["p_value"] == pytest.approx(p_value(gains), rel=1e-3)
        # All documents differ alike, so other documents would say the same.
        assert entry["difference_document_interval"] == pytest.approx([gains.mean()] * 2, abs=1e-6)
        # Unpaired, the seeds would drown the difference.
        assert np.ptp(entry["interval"]) > 10 * np.ptp(entry["difference_interval"])


def test_the_reference_is_alibi_or_the_first(comparison):
    assert comparison["reference"] == "alibi"
    assert "difference" not in entry_of(comparison, "alibi", 16)
    runs = {key: value for key, value in planted().items() if key[0] != "alibi"}
    other = summarize(("breaks", "better"), (0, 1, 2), runs)
    assert other["reference"] == "breaks"
    assert entry_of(other, "better", 64)["difference"] == pytest.approx(-60.06, rel=1e-4)


def test_verdicts_over_seeds(comparison):
    verdicts = {method["name"]: method["verdict"] for method in comparison["methods"]}
    assert verdicts["alibi"]["holds_to"] == 64
    assert verdicts["alibi"]["text"] == (
        "holds to 64 (4x, the longest): +0.00% [+0.00%, +0.00%] over seeds, [+0.00%, +0.00%] over "
        "documents; uses context to at most 32 [32, 32]"
    )
    assert verdicts["better"]["text"].endswith("; uses context to 32 [32, 128]")
    assert verdicts["alibi"]["uses_context_to_seeds"] == [32, 32, 32]
    assert verdicts["breaks"]["holds_to"] == 16
    assert "does not hold beyond the training length; at 32: +7" in verdicts["breaks"]["text"]


def test_a_method_that_learned_too_little_is_not_judged():
    """At a loss of 20 nats more than the others one seed holds, to worse than any n-gram."""
    runs = planted()
    runs["breaks", 1] = run([20, 20, 20])
    comparison = summarize(METHODS, (0, 1, 2), runs)
    verdicts = {method["name"]: method["verdict"] for method in comparison["methods"]}
    assert verdicts["alibi"]["learned"] is True and verdicts["alibi"]["holds_to"] == 64
    assert verdicts["breaks"]["learned"] is False and verdicts["breaks"]["holds_to"] is None
    assert verdicts["breaks"]["text"] == (
        "learned too little for a verdict: not clearly better than trigrams of the training text "
        "in 1 of 3 seeds"
    )
    assert any("Not judged: breaks. " in sentence for sentence in findings(comparison))
    floors = comparison["floors"]["fixed_targets"]
    level = TEXT[:, -8:].astype(np.float64).mean()
    assert [floor["n"] for floor in floors] == [1, 2, 3]
    assert [f["nats_per_token"] for f in floors] == pytest.approx(
        [level + 9 - n for n in (1, 2, 3)]
    )
    bits = f"{(level + 6) / math.log(2) / 2.0:.4f}"
    assert f"| trigrams of the training text | –     | {bits} " in comparison_table(comparison)
    labels = {text.get_text() for axes in drawn(comparison).axes for text in axes.texts}
    assert {"unigrams", "bigrams", "trigrams"} <= labels


# Changes at 32 tokens by seed and by document, in nats of about 3: an interval that contains +1%.
SEEDS_DIFFER = ([-0.02, 0, 0.07], np.zeros(6))
DOCUMENTS_DIFFER = ([0, 0, 0], np.array([0.3, -0.3, 0.3, -0.3, 0.3, -0.3]))


@pytest.mark.parametrize(
    ("by_seed", "by_document", "words"),
    [
        (*SEEDS_DIFFER, "an interval over seeds contains"),
        (*DOCUMENTS_DIFFER, "an interval over documents contains"),
        (
            SEEDS_DIFFER[0],
            DOCUMENTS_DIFFER[1],
            "an interval over seeds and one over documents contains",
        ),
    ],
)
def test_an_interval_that_contains_the_tolerance_is_not_certain(by_seed, by_document, words):
    runs = {
        ("alibi", seed): run([0, change + by_document[DOCUMENT][:, None], 0])
        for seed, change in enumerate(by_seed)
    }
    comparison = summarize(("alibi",), (0, 1, 2), runs)
    assert f"(not certain: {words} +1%)" in comparison["methods"][0]["verdict"]["text"]


def test_the_interval_over_documents_is_that_of_an_evaluation():
    """And each seed counts as a fraction of its own loss: one with all twice as high adds none."""
    change = np.array([0.3, -0.3, 0.3, -0.2, 0.1, -0.3])[DOCUMENT][:, None]
    once, twice = run([0, change, 0]), run([TEXT, TEXT + 2 * change, TEXT])
    expected = once.evaluation["protocols"]["fixed_targets"][1]["relative_change_interval"]
    for runs in ({("alibi", 0): once}, {("alibi", 0): once, ("alibi", 1): twice}):
        entry = entry_of(summarize(("alibi",), (0, 1), runs), "alibi", 32)
        assert entry["relative_change_document_interval"] == pytest.approx(expected, rel=1e-5)


def test_time_is_the_median_over_runs(comparison):
    better = comparison["methods"][2]
    assert better["seconds_per_step"] == pytest.approx(1.1)
    assert better["seconds_per_step_range"] == pytest.approx([0.09, 2.3])  # over seeds
    assert "| 1,100.0 [90.0, 2,300.0] |" in comparison_table(comparison)
    assert (better["memory_bytes"], better["parameters"]) == (10**7, 820_000)


def test_only_seeds_that_both_finished_are_paired():
    runs = planted()
    del runs["alibi", 1], runs["better", 2]
    runs["better", 2] = Run("diverged", "loss is nan at step 3", None, 0.1, 1, 1)
    comparison = summarize(METHODS, (0, 1, 2), runs)
    entry = entry_of(comparison, "better", 32)
    assert entry["difference_seeds"] == pytest.approx([GAIN[0]], abs=1e-6)
    assert (entry["difference_interval"], entry["p_value"]) == (None, None)
    assert len(entry["nats_per_token_seeds"]) == 2
    assert comparison["missing"] == [{"method": "alibi", "seed": 1}]
    assert (comparison["num_finished"], comparison["num_runs"]) == (7, 9)
    text = comparison_table(comparison)
    assert "1 of 9 runs are missing: alibi seed 1" in text
    assert "better seed 2 diverged (loss is nan at step 3)" in text


@pytest.mark.parametrize("other", [{"documents": np.arange(10)}, {"lengths": (16, 64)}])
def test_runs_on_other_tokens_are_refused(other):
    runs = planted() | {("better", 2): run([0] * len(other.get("lengths", LENGTHS)), **other)}
    with pytest.raises(UserError, match="were not evaluated on the same tokens"):
        summarize(METHODS, (0, 1, 2), runs)


@pytest.mark.parametrize("name", ["step", "tokens_sha256", "split"])
def test_runs_evaluated_otherwise_are_refused_even_where_all_counts_agree(name):
    runs = planted()
    evaluation = runs["better", 2].evaluation
    (evaluation["config"]["evaluation"] if name == "split" else evaluation)[name] = "other"
    with pytest.raises(UserError, match=rf"\({name} differ") as raised:
        summarize(METHODS, (0, 1, 2), runs)
    assert "\n" not in str(raised.value)


def test_runs_of_unknown_tokens_are_refused():
    runs = planted()
    for one in runs.values():
        del one.evaluation["tokens_sha256"]
    with pytest.raises(UserError, match="tokens_sha256 differ or are not known"):
        summarize(METHODS, (0, 1, 2), runs)


def not_finite():
    return {("alibi", 0): run([0, np.inf, np.nan]), ("breaks", 0): run([np.nan] * 3)}


def one_document():
    return {("alibi", 0): run([0, 0, 1], documents=np.zeros(10, int))}


def all_diverged():
    return {("alibi", 0): Run("diverged", "loss is nan at step 3", None, None, None, 1)}


@pytest.mark.parametrize(
    "make", [planted, lambda: planted((0,)), not_finite, one_document, all_diverged]
)
def test_every_kind_of_result_is_written(make, tmp_path):
    comparison = summarize(METHODS, (0, 1, 2), make())
    json.dumps(comparison, allow_nan=False)
    text = comparison_table(comparison)
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    for name in METHODS:
        assert f"| {name} " in text
    comparison_figure(comparison, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "figure.png"]
    image = matplotlib.image.imread(tmp_path / "figure.png")
    assert image.shape[:2] == (600, 1380)
    assert image[..., :3].std() > 0.05  # something is drawn


LONG = "rotary+length_scaling=yarn+scaling_factor=8"


def test_nothing_overlaps_where_all_methods_leave_the_figure():
    names = ("alibi", "sinusoidal", "rotary", "t5", "kerple_log", "none", LONG)
    runs = {
        (name, seed): run([0.1 * number + 0.01 * seed, 20 + number, 50 + number])
        for number, name in enumerate(names)
        for seed in (0, 1)
    }
    figure = drawn(summarize(names, (0, 1), runs))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-1] == "lowest to highest seed"
    left, right = (
        next(text for text in axes.texts if text.get_text().startswith("▲")).get_window_extent()
        for axes in figure.axes
    )
    assert figure.bbox.x0 <= left.x0 < left.x1 < right.x0 < right.x1
    assert right.x1 <= legend.get_window_extent().x0
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert left.y1 <= titles[0].y0 and right.y1 <= titles[1].y0 < titles[1].y1 <= figure.bbox.y1
    panel = figure.axes[0].get_window_extent()
    assert panel.y1 <= left.y0 and panel.width > 0.25 * figure.bbox.width


def test_a_band_that_is_not_there_is_not_named():
    figure = drawn(summarize(("alibi",), (0,), {("alibi", 0): run([0, 0, 0])}))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alibi"]


def test_the_table_says_what_was_planted(comparison):
    text = comparison_table(comparison)
    bits = 1 / (math.log(2) * 2.0)
    level = TEXT[:, -8:].astype(np.float64).mean() + np.mean(list(SHIFT.values()))
    assert f"| {level * bits:.4f} ± " in text
    assert f"| {-0.06 * bits:+.4f} | " in text
    better = f"better has the lowest loss on fixed targets, {(level - 0.06) * bits:.4f} bits"
    assert f"At 64 tokens (the longest) {better}" in text
    assert "from 6 documents" in text
    assert "missing" not in text


def lead(runs):
    """What is found about planted runs, a sentence each."""
    return findings(summarize(METHODS, (0, 1, 2), runs))


def test_leads_are_paired_and_end_where_they_end(comparison):
    """At 16 tokens "breaks" leads by 0.04 on average, seed by seed; "better" is the next."""
    at_16, at_64 = comparison["leaders"]
    assert (at_16["length"], at_16["method"], at_16["next"]) == (16, "breaks", "better")
    gaps = np.array([-0.1 - GAIN[seed] for seed in (0, 1, 2)])
    assert at_16["difference_seeds"] == pytest.approx(gaps, abs=1e-6)
    assert at_16["difference_interval"] == pytest.approx(t_interval(gaps), abs=1e-5)
    assert at_16["p_value"] == pytest.approx(p_value(gaps), rel=1e-3)
    assert (at_64["length"], at_64["method"], at_64["next"]) == (64, "better", "alibi")
    first, last, ends = findings(comparison)
    bits = 1 / (math.log(2) * 2.0)
    low, high = (x * bits for x in t_interval(gaps))
    assert f": {gaps.mean() * bits:+.4f} [{low:+.4f}, {high:+.4f}] over seeds, [" in first
    assert first.endswith("against better, the next.")
    assert "-0.0433" in last and "against alibi, the next." in last
    change = entry_of(comparison, "breaks", 64)["relative_change"]
    assert ends.startswith("breaks is ahead at 16 tokens and not at 64: there its loss on the same")
    assert f"has changed by {percent(change)}." in ends and change > 10


def test_who_is_ahead_of_the_reference_and_falls_behind_is_named_though_another_leads():
    """As rotary on short training lengths: here "better" leads at all lengths."""
    runs = planted()
    for seed in SHIFT:
        level = SHIFT[seed] + GAIN[seed]
        runs["breaks", seed] = run([level - 0.05, level + 2, level + 60])
        runs["better", seed] = run([level - 0.1] * 3)
    found = lead(runs)
    assert found[2].startswith("breaks is ahead of alibi at 16 tokens and not at 64: there its")
    assert not any(sentence.startswith("better is ahead") for sentence in found)


def test_leads_that_another_sample_might_end_are_not_certain():
    runs = planted()
    for seed, gap in enumerate((-0.3, 0.02, 0.01)):
        runs["breaks", seed] = run([SHIFT[seed] + GAIN[seed] + gap] * 3)
    assert "(not certain: an interval over seeds contains zero)" in lead(runs)[0]
    by_document = np.array([-0.5, 0.5, -0.5, 0.5, -0.5, -0.5])[DOCUMENT][:, None]
    for seed in SHIFT:
        runs["breaks", seed] = run([SHIFT[seed] + GAIN[seed] + by_document] * 3)
    assert "(not certain: an interval over documents contains zero)" in lead(runs)[0]
    assert lead(planted((0,)))[0].endswith(", in one seed, and another may say otherwise.")
    alone = lead({("breaks", 0): run([0, np.nan, np.nan])})
    assert len(alone) == 1 and alone[0].endswith("bits per byte.")


def test_gains_of_nonoverlapping_windows_alone_are_named_where_all_seeds_warn():
    runs = planted()
    for seed in SHIFT:
        runs["alibi", seed].evaluation["verdict"]["warning"] = "would mislead"
    runs["better", 1].evaluation["verdict"]["warning"] = "would mislead"
    assert "Nonoverlapping windows alone would mislead for alibi: " in lead(runs)[-1]
