"""Planted runs, whose comparison is known, go through numbers, tables and figure."""

import json
import math

import matplotlib.image
import numpy as np
import pytest

from alibi_jax.errors import UserError
from alibi_jax.evaluation.compare_figure import comparison_figure
from alibi_jax.evaluation.compare_statistics import p_value, t_interval
from alibi_jax.evaluation.compare_summary import Run, summarize
from alibi_jax.evaluation.compare_table import comparison_table
from alibi_jax.evaluation.report import summarize as summarize_run
from alibi_jax.evaluation.windows import Windows

LENGTHS = (16, 32, 64)
TEXT = np.random.default_rng(0).gamma(3, size=(10, 64)).astype(np.float32)
DOCUMENT = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 5])


def run(levels, *, documents=DOCUMENT, lengths=LENGTHS, seconds=0.1):
    """A finished run whose loss at each length is the text's own plus a level."""
    windows = Windows(np.zeros((10, 65), np.int32), documents, "document")
    losses = {
        length: TEXT + np.float32(level) for length, level in zip(lengths, levels, strict=True)
    }
    evaluation = summarize_run(
        losses, windows, train_length=16, num_targets=8, bytes_per_token=2.0, num_bootstrap=200
    )
    evaluation["left_out"] = []
    evaluation["verdict"] |= {"uses_context_to": 32, "retrieves_to": None}
    evaluation["config"] = {"evaluation": {"num_bootstrap": 200}}
    return Run("finished", None, evaluation, seconds, 10**7, 820_000)


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
        runs["better", seed] = run([level + GAIN[seed]] * 3, seconds=0.1 + seed)
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
        "holds to 64 (4x, the longest): +0.00% [+0.00%, +0.00%]; uses context to 32"
    )
    assert verdicts["alibi"]["uses_context_to_seeds"] == [32, 32, 32]
    assert verdicts["breaks"]["holds_to"] == 16
    assert "does not hold beyond the training length; at 32: +7" in verdicts["breaks"]["text"]


def test_an_interval_that_contains_the_tolerance_is_not_certain():
    runs = {("alibi", seed): run([0, change, 0]) for seed, change in enumerate((-0.02, 0, 0.07))}
    comparison = summarize(("alibi",), (0, 1, 2), runs)
    assert "(not certain" in comparison["methods"][0]["verdict"]["text"]


def test_time_is_the_median_over_runs(comparison):
    better = comparison["methods"][2]
    assert better["seconds_per_step"] == pytest.approx(1.1)
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


def test_the_table_says_what_was_planted(comparison):
    text = comparison_table(comparison)
    bits = 1 / (math.log(2) * 2.0)
    level = TEXT[:, -8:].astype(np.float64).mean() + np.mean(list(SHIFT.values()))
    assert f"| {level * bits:.4f} ± " in text
    assert f"| {-0.06 * bits:+.4f} | " in text
    assert (
        f"At 64 tokens better has the lowest loss on fixed targets, {(level - 0.06) * bits:.4f}"
        in text
    )
    assert "from 6 documents" in text
    assert "missing" not in text
