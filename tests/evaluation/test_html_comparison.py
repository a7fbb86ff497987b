"""A comparison on the page: what its numbers say, and the runs that are still there."""

import json
import math

import pytest

from alibi_jax.evaluation import write_json
from alibi_jax.evaluation.compare_summary import Run, summarize
from alibi_jax.evaluation.compare_table import findings
from alibi_jax.evaluation.html import page
from alibi_jax.evaluation.html.read import read
from tests.evaluation import report_files
from tests.evaluation.browser import CHROMIUM, browser
from tests.evaluation.test_html import opened

METHODS = {
    "alibi": {},
    "rotary": {"position": "rotary", "growth": 0.3},
    "none": {"position": "none"},
}
SEEDS = (0, 1)


def comparison(directory, runs=None):
    """What `alibi compare` leaves: all runs but one, which diverged, and one that is missing."""
    finished = {}
    for name, settings in METHODS.items():
        for seed in SEEDS:
            path = report_files.evaluated(directory / name / f"seed-{seed}", **settings)
            summary = json.loads((path / "evaluation.json").read_text())
            finished[name, seed] = Run("finished", None, summary, 0.02, 10**7, 820_000)
    finished["none", 0] = Run("diverged", "loss is nan at step 3", None, None, None, 820_000)
    del finished["none", 1]
    numbers = summarize(tuple(METHODS), SEEDS, finished if runs is None else runs)
    numbers |= {"config": report_files.config(), "versions": report_files.VERSIONS}
    write_json(numbers, directory / "comparison.json")
    configs = {
        name: report_files.config(settings.get("position", "alibi"))
        for name, settings in METHODS.items()
    }
    (directory / "arguments.json").write_text(json.dumps({"methods": configs, "seeds": 2}))
    return directory


@pytest.fixture
def directory(tmp_path):
    return comparison(tmp_path / "three")


def test_methods_are_the_rows(directory):
    found = opened(directory)
    numbers = json.loads((directory / "comparison.json").read_text())
    rows = {row[0]: row[1:] for row in found.cells("Bits per byte, fixed targets")[1:]}
    floors = [f"{name} of the training text" for name in ("unigrams", "bigrams", "trigrams")]
    assert list(rows) == ["alibi", "rotary", *floors]  # the third has no run that finished
    for method in numbers["methods"][:2]:
        entries = method["protocols"]["fixed_targets"]
        for cell, entry in zip(rows[method["name"]], entries, strict=True):
            assert cell.startswith(f"{entry['nats_per_token'] / math.log(2):.4f}")
    said = [item["text"] for item in found.all("li")]
    assert [sentence for sentence in findings(numbers) if sentence in said] == findings(numbers)
    assert len(findings(numbers)) == 3
    verdicts = {row[0]: row[1:] for row in found.cells("Verdicts of three")[1:]}
    assert verdicts["alibi"][:2] == ["2 of 2", "64"]
    assert verdicts["rotary"][:2] == ["2 of 2", "16"]
    assert verdicts["none"][:2] == ["0 of 2", "no run has finished"]


def test_what_failed_and_what_is_missing_comes_first(directory):
    text = opened(directory).all("section")[0]["text"]
    assert "1 of 6 runs are missing: none seed 1" in text
    assert "none seed 0 diverged: loss is nan at step 3" in text


def test_seeds_are_paired_with_the_reference(directory):
    header, *rows = opened(directory).cells("Against alibi, paired")
    assert header[-1] == "each seed"
    assert [row[:2] for row in rows] == [["rotary", "16"], ["rotary", "32"], ["rotary", "64"]]
    numbers = json.loads((directory / "comparison.json").read_text())
    entry = numbers["methods"][1]["protocols"]["fixed_targets"][2]
    assert rows[2][2] == f"{entry['difference'] / math.log(2):+.4f}"


def test_runs_of_a_comparison_are_drawn_and_their_settings_compared(directory):
    found = opened(directory)
    assert found.cells("rotary seed-1: needles found")
    assert ["model.position", "alibi", "rotary", "none"] in found.cells("Settings that differ")
    assert found.cells("Cost of training, three")[1] == ["alibi", "820,000", "20.0", "10.0"]


def test_what_the_data_said_of_a_method_is_no_difference(directory, tmp_path):
    """A comparison is asked for without a vocabulary's size, which its runs know."""
    alone = report_files.run(tmp_path / "alone", vocab_size=257)
    for path in (alone, *directory.glob("*/seed-*")):
        record = json.loads((path / "config.json").read_text())
        record["config"]["model"]["vocab_size"] = 257
        (path / "config.json").write_text(json.dumps(record))
    rows = {row[0] for row in opened(directory, alone).cells("Settings that differ")}
    assert "model.position" in rows and "model.vocab_size" not in rows
    assert ["model.vocab_size", "257"] in opened(directory).cells("All settings of rotary")


def test_methods_that_share_a_training_have_evaluations_of_their_own(directory):
    whole = json.loads((directory / "alibi" / "seed-0" / "evaluation.json").read_text())
    whole["verdict"]["text"] = "Scaled, it holds further."
    write_json(whole, directory / "alibi" / "seed-0" / "evaluation-linear-4.json")
    numbers = json.loads((directory / "comparison.json").read_text())
    numbers["methods"][1] |= {"directory": "alibi", "evaluation": "evaluation-linear-4.json"}
    write_json(numbers, directory / "comparison.json")
    found = opened(directory)
    said = [item["text"] for item in found.all("li")]
    assert any(text.startswith("rotary seed-0: Scaled, it holds further.") for text in said)
    assert any(text.startswith("alibi seed-0: Holds to 64 tokens") for text in said)
    missing = found.all("section")[-1]["text"]
    assert "rotary seed-1: evaluation-linear-4.json (made by `alibi eval`)" in missing


def test_nothing_has_finished(tmp_path):
    found = opened(comparison(tmp_path / "begun", runs={}))
    assert "6 of 6 runs are missing" in found.all("section")[0]["text"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package is `chromium`)")
def test_in_a_real_browser(directory, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(*read([directory])))
    with browser(tmp_path / "profile") as chromium:
        for width in (400, 1200):
            chromium.open(file, width=width)
            assert chromium.complaints() == []
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
