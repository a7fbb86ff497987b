"""The page says what the files hold, escapes all of it, and opens cleanly in a real browser."""

import html.parser
import itertools
import json
import math
import re
import shutil

import pytest

from alibi_jax import cli
from alibi_jax.evaluation import write_json
from alibi_jax.evaluation.html import page
from alibi_jax.evaluation.html.chart import Axis, Guides, Line, chart
from alibi_jax.evaluation.html.read import read
from alibi_jax.evaluation.html.tags import tag, text
from tests.evaluation import report_files
from tests.evaluation.browser import CHROMIUM, browser
from tests.evaluation.oracles import scorer
from tests.evaluation.test_assess import evaluate

VOID = {"br", "meta"}
HOSTILE = "<script>alert(1)</script>&\"'"


class Page(html.parser.HTMLParser):
    """Elements with their attributes and text; fails where tags do not match."""

    def __init__(self, markup):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(markup)
        self.close()
        assert not self._open

    def handle_starttag(self, name, attributes):
        """Collects an element."""
        assert len(dict(attributes)) == len(attributes)
        element = {"tag": name, "text": "", **dict(attributes)}
        self.elements.append(element)
        if name not in VOID:
            self._open.append(element)

    def handle_endtag(self, name):
        """Closes the innermost element, which must be this one."""
        assert self._open.pop()["tag"] == name

    def handle_data(self, data):
        """Adds text to all elements around it."""
        for element in self._open:
            element["text"] += data

    def all(self, name):
        """Elements of a name."""
        return [element for element in self.elements if element["tag"] == name]

    def cells(self, caption):
        """Texts of the rows of the table whose caption starts so."""
        found, rows = False, []
        for element in self.elements:
            if element["tag"] == "caption":
                found = element["text"].startswith(caption)
            elif found and element["tag"] == "tr":
                rows.append([])
            elif found and element["tag"] in ("td", "th"):
                rows[-1].append(element["text"])
        assert rows, f"no table {caption}"
        return rows


def opened(*directories):
    return Page(page(*read(directories)))


@pytest.fixture
def two(tmp_path):
    return [
        report_files.evaluated(tmp_path / "alibi"),
        report_files.run(tmp_path / "sinusoidal", "sinusoidal", growth=0.3),
    ]


def test_well_formed_accessible_and_complete(two):
    found = opened(*two)
    assert found.all("html")[0]["lang"] == "en"
    identifiers = [element["id"] for element in found.elements if "id" in element]
    assert len(set(identifiers)) == len(identifiers)
    links = [link["href"] for link in found.all("a")]
    assert links == [f"#{identifier}" for identifier in identifiers]
    assert len(links) == 11  # all sections but that of seeds
    levels = [int(e["tag"][1]) for e in found.elements if e["tag"] in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    figures = [drawing for drawing in found.all("svg") if drawing.get("aria-hidden") != "true"]
    assert len(figures) == len(found.all("figure")) >= 9
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    assert len(found.all("caption")) == len(found.all("table"))
    assert not {"script", "link", "img", "iframe"} & {element["tag"] for element in found.elements}
    assert not [e for e in found.elements if {"src", "srcset", "onclick", "onload"} & e.keys()]


def test_losses_are_those_of_the_file(two):
    written = json.loads((two[1] / "extrapolation.json").read_text())
    to_bits = 1 / math.log(2) / written["bytes_per_token"]
    for protocol, name in (
        ("fixed_targets", "fixed targets"),
        ("nonoverlapping", "nonoverlapping windows"),
    ):
        header, _, row, *floors = opened(*two).cells(f"Bits per byte, {name}")
        assert header == ["", "16 tokens", "32 tokens", "64 tokens"]
        assert row[0] == "sinusoidal"
        for cell, entry in zip(row[1:], written["protocols"][protocol], strict=True):
            low, high = (to_bits * x for x in entry["interval"])
            level = f"{to_bits * entry['nats_per_token']:.4f}"
            assert cell.startswith(f"{level}[{low:.4f}, {high:.4f}]")
        assert row[1].endswith("training length")
        assert "+30.0%" in row[2]  # a doubling adds this to the fixture
        assert "+60.0%" in row[3]
        for cells, floor in zip(floors[-3:], written["verdict"]["floors"][protocol], strict=True):
            assert cells[1:] == [f"{to_bits * floor['nats_per_token']:.4f}"] * 3
        assert [cells[0].split()[0] for cells in floors] == ["unigrams", "bigrams", "trigrams"]


def test_verdicts_come_with_interval_protocol_and_warning(two):
    cards = [e["text"] for e in opened(*two).all("article")]
    for said in (
        "64 tokens[32, 64]fixed targets",
        "32 tokens[32, 48]truncated input",
        "no length[0, 16]needle",
        "Warning: nonoverlapping windows alone would mislead",
    ):
        assert said in cards[0]
    assert cards[1].count("not measured") == 2
    assert "does not hold beyond the training length" in cards[1]


def test_a_model_that_learned_too_little_has_no_verdict(two):
    whole = json.loads((two[0] / "evaluation.json").read_text())
    whole["verdict"] |= {"learned": False, "holds_to": None, "uses_context_to": None}
    write_json(whole, two[0] / "evaluation.json")
    cards = [e["text"] for e in opened(*two).all("article")]
    assert cards[0].count("no verdict") == 2 and "no length[0, 16]needle" in cards[0]


def test_other_protocols_are_shown(two):
    found = opened(*two)
    needle = found.cells("alibi: needles found")
    assert needle[0] == ["tokens", "depth 0%", "depth 50%", "depth 100%"]
    assert needle[3] == ["64", *3 * ["25%[10%, 50%]"]]
    assert found.cells("Pairs recalled")[1] == ["alibi", *2 * ["100%[90%, 100%]"], "25%[10%, 50%]"]
    assert found.cells("Bits per byte with the input cut")[0] == ["", "C = 32", "C = 64"]
    truncation = found.cells("Bits per byte with truncated attention")
    assert truncation[0] == ["", "W = 32", "W = 48", "W = 64"]
    assert truncation[1][1].endswith("+1.00% [+0.50%, +1.50%]")
    heads = found.cells("alibi: nearest keys")
    assert heads[2] == ["0, 1", "5", "16", "40", "0.25", "2", "5", "10"]


def test_positions_scaled_at_inference_are_shown_beside_the_run(tmp_path):
    directory = report_files.run(tmp_path / "rotary", "rotary")
    shutil.copy(directory / "extrapolation.json", directory / "evaluation-yarn-8.json")
    shutil.copy(directory / "extrapolation.json", directory / "evaluation-yarn-8.old1.json")
    runs, _ = read([directory])
    assert [run.name for run in runs] == ["rotary", "rotary-yarn-8"]
    assert runs[0].metrics and not runs[1].metrics


def test_settings_that_differ_are_marked(tmp_path):
    one = report_files.run(tmp_path / "one")
    other = report_files.run(tmp_path / "other", "sinusoidal", num_layers=3)
    found = opened(one, other)
    assert found.cells("Settings that differ")[1:] == [
        ["model.num_layers", "2", "3"],
        ["model.position", "alibi", "sinusoidal"],
    ]
    assert [mark["text"] for mark in found.all("mark")] == ["3", "sinusoidal"]
    same = opened(one, report_files.run(tmp_path / "same"))
    assert not same.all("mark")
    assert ["data.source", "stdlib"] in same.cells("All settings of one")


def test_says_what_is_missing(tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    run = report_files.run(tmp_path / "run")
    shutil.copy(run / "config.json", begun)
    (begun / "metrics.jsonl").write_text('{"step": 10, "bits_per_byte": 6.0}\n{"step": 2')
    found = opened(begun)
    assert "Not evaluated yet" in found.all("article")[0]["text"]
    missing = found.all("section")[-1]["text"]
    assert "evaluation.json" in missing
    assert "extrapolation.json" in missing
    assert "metrics.jsonl" not in missing  # what is left of it is drawn
    assert (
        "left out: 128" in opened(report_files.evaluated(tmp_path / "e")).all("section")[-1]["text"]
    )


def test_numbers_of_two_evaluations_are_not_mixed(tmp_path):
    """The extrapolation may be of fewer steps than what `alibi eval` evaluated since."""
    directory = report_files.evaluated(tmp_path / "run")
    whole = json.loads((directory / "evaluation.json").read_text())
    del whole["protocols"]["fixed_targets"]
    (directory / "evaluation.json").write_text(json.dumps(whole))
    with pytest.raises(AssertionError, match="no table"):
        opened(directory).cells("Bits per byte, fixed targets")
    (directory / "evaluation.json").unlink()
    assert opened(directory).cells("Bits per byte, fixed targets")


def test_numbers_that_are_not_finite(tmp_path):
    directory = report_files.run(tmp_path / "run")
    summary = json.loads((directory / "extrapolation.json").read_text())
    for entries in summary["protocols"].values():
        for entry in entries:
            entry |= dict.fromkeys(set(entry) - {"length"})
    (directory / "extrapolation.json").write_text(json.dumps(summary))
    assert opened(directory).cells("Bits per byte, fixed targets")[1][1].startswith("not finite")


def test_everything_is_escaped(tmp_path):
    directory = report_files.evaluated(tmp_path / "&<b>")
    for file in ("evaluation.json", "config.json"):
        whole = json.loads((directory / file).read_text())
        whole["config"]["data"]["source"] = HOSTILE
        if file == "evaluation.json":
            whole["verdict"] |= {"text": HOSTILE, "warning": HOSTILE, "details": HOSTILE}
            whole["left_out"] = [HOSTILE]
            whole["versions"][HOSTILE] = HOSTILE
        (directory / file).write_text(json.dumps(whole))
    markup = page(*read([directory]))
    assert "<script" not in markup
    assert "<b>" not in markup
    found = Page(markup)
    assert "".join(e["text"] for e in found.all("section")).count(HOSTILE) == 7
    assert tag("p", "<", title='"', data_x=None) == '<p title="&quot;">&lt;</p>'
    assert text("\ud800") == "?"  # of the name of a file that is not UTF-8


def points(figure):
    found = Page(figure)
    return [
        [tuple(map(float, pair.split(","))) for pair in line["points"].split()]
        for line in found.all("polyline")
    ]


def test_curves_are_where_the_numbers_are():
    values = [(16, 2.0), (32, 4.0), (64, 3.0), (128, None), (256, 2.0)]
    axis = Axis("tokens", "log")
    first, second = points(chart([Line("a", values)], axis, Axis("loss"), title="t"))
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # doublings are equally far apart
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.11)  # upwards, in proportion
    assert second == [pytest.approx((x0 + 4 * (x1 - x0), y0), abs=0.5)]  # after the gap
    symlog = Axis("change", "symlog")
    ((_, zero), (_, nine), (_, many)) = points(
        chart([Line("a", [(1, 0.0), (2, 9.0), (4, 99.0)])], axis, symlog, title="t")
    )[0]
    assert zero - nine == pytest.approx(nine - many, abs=0.11)  # log10(1 + y) is 0, 1, 2


def test_interval_that_is_far_away_is_cut_off():
    line = Line("a", [(1, 2.0), (2, 2.1)], [(2.0, 2.0), (-1000.0, 1000.0)])
    guides = Guides(band=1.0)
    found = Page(chart([line], Axis("x"), Axis("y"), title="t", guides=guides))
    heights = [float(pair.split(",")[1]) for pair in found.all("polygon")[0]["points"].split()]
    assert 0 < min(heights) < max(heights) < 280


def failing(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert not output.out
    return output.err


def test_bad_input_ends_in_one_line(tmp_path, capsys):
    run, empty = report_files.run(tmp_path / "run"), tmp_path / "empty.html"
    empty.mkdir()
    extrapolation = (run / "extrapolation.json").read_text()
    before = sorted(tmp_path.rglob("*"))
    assert "holds neither a run nor a comparison" in failing(capsys, run, empty)
    assert "no such directory" in failing(capsys, tmp_path / "nowhere")
    assert "given twice" in failing(capsys, run, run)
    assert "no DIR" in failing(capsys, "--output=x.html")
    assert "--theme is not known" in failing(capsys, run, "--theme=dark")
    assert "cannot be written (No such file" in failing(
        capsys, run, f"--output={tmp_path}/none/x.html"
    )
    assert "cannot be written" in failing(capsys, run, f"--output={empty}")
    for name in ("x.pdf", "x", "x.html.gz"):
        assert "give a name that ends in .html" in failing(
            capsys, run, f"--output={tmp_path}/{name}"
        )
        assert not (tmp_path / name).exists()
    for content, message in (
        ("{", "cannot read"),
        ("[]", "no JSON object"),
        ('{"protocols": {"fixed_targets": [{}]}, "train_length": 1}', "a form that"),
        ('{"protocols": 3}', "a form that"),
        (re.sub('"bits_per_byte": [0-9.]+', '"bits_per_byte": NaN', extrapolation), "a form that"),
        (re.sub('"length": [0-9]+', '"length": 0', extrapolation), "a form that"),
    ):
        (run / "extrapolation.json").write_text(content)
        assert message in failing(capsys, run)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_command_writes_one_file(tmp_path, capsys):
    run = report_files.run(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    Page((run / "report.html").read_text("utf-8"))
    assert cli.main(["report", str(run), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_text() == (run / "report.html").read_text()


# Elements that stick out of the window, other than in tables that scroll by themselves.
OVERFLOWING = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll > *") && e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.tagName + " " + e.textContent.slice(0, 40))
"""
# Texts whose contrast with what is behind them is below 4.5, as WCAG 2.1 has it (AA).
PALE = """
(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const over = (top, under) => top.slice(0, 3)
    .map((c, i) => c * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const behind = e => e ? over(numbers(getComputedStyle(e).backgroundColor),
    behind(e.parentElement)) : [255, 255, 255];
  const light = color => color.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return [...document.querySelectorAll("body *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .map(e => [e, getComputedStyle(e)])
    .map(([e, s]) => [e, contrast(light(numbers(e.tagName === "text" ? s.fill : s.color)),
      light(behind(e)))])
    .filter(([e, c]) => c < 4.5).map(([e, c]) => e.textContent.slice(0, 40) + " " + c);
})()
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package is `chromium`)")
def test_in_a_real_browser(two, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(*read(two)))
    with browser(tmp_path / "profile") as chromium:
        for width, dark in itertools.product((400, 1200), (False, True)):
            chromium.open(file, width=width, dark=dark)
            assert chromium.evaluate("innerWidth") == width
            assert chromium.evaluate("document.querySelectorAll('section').length") == 11
            assert chromium.complaints() == []
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
            assert chromium.evaluate(OVERFLOWING) == []
            assert chromium.evaluate(PALE) == []


def test_what_alibi_eval_writes_is_shown(tmp_path):
    """The files above are written by hand; this one is the evaluation's own, of a planted model."""
    found = evaluate(scorer(), lengths=(64, 128, 256))
    directory = report_files.run(tmp_path / "planted")
    write_json(found | {"versions": report_files.VERSIONS}, directory / "evaluation.json")
    shown = opened(directory)
    card = shown.all("article")[0]["text"]
    assert "256 tokens[256, 256]fixed targets" in card  # holds, and retrieves
    assert "64 tokens[64, 64]truncated input" in card
    assert found["verdict"]["warning"] in card
    for name, field, symbol, caption in (
        ("truncated_input", "context", "C", "Bits per byte with the input cut"),
        ("truncation", "window", "W", "Bits per byte with truncated attention"),
    ):
        entries = found["protocols"][name]
        header, row = shown.cells(caption)
        assert header[1:] == [f"{symbol} = {entry[field]:,}" for entry in entries]
        for cell, entry in zip(row[1:], entries, strict=True):
            assert cell.startswith(f"{entry['bits_per_byte']:.4f}")
    needle = {
        (e["length"], e["depth"]): e["accuracy"] for e in found["protocols"]["needle"]["entries"]
    }
    depths, *rows = shown.cells("planted: needles found")
    assert len(rows) * (len(depths) - 1) == len(needle)
    assert all(cell.startswith("100%") for row in rows for cell in row[1:])
    assert set(needle.values()) == {1.0}
    assert len(shown.cells("planted: nearest keys")) == 1 + len(
        found["protocols"]["attention_mass"]["heads"]
    )
