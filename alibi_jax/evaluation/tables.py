"""The numbers of an evaluation as text, for a screen of 100 columns."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from alibi_jax.evaluation.ngrams import NAMES
from alibi_jax.evaluation.verdict import few_documents, much_seen, percent, relative_change

_WIDTH = 100


def table(summary: Mapping[str, Any]) -> str:
    """Write a summary as plain text of at most 100 columns that ends with the verdict."""
    protocols = summary["protocols"]
    unit, level = _unit(summary)
    lines = [
        f"{'':16}{'nonoverlapping windows':<28}fixed targets (the last {summary['num_targets']} "
        "tokens of each window)",
        f"{'tokens':>8}{'x':>6}  {unit:>9}  {'loss change':<17}{unit:>9}  "
        "loss change [95% interval]",
    ]
    for window, fixed in zip(protocols["nonoverlapping"], protocols["fixed_targets"], strict=True):
        length = window["length"]
        trained = length == summary["train_length"]
        change = "" if trained else _or(percent, window["relative_change"])
        fixed_change = "(training length)" if trained else relative_change(fixed)
        lines.append(
            f"{length:>8}{length / summary['train_length']:>6g}  "
            f"{level(window):>9}  {change:<17}{level(fixed):>9}  {fixed_change}"
        )
    for window, fixed in zip(*map(partial(_floors, summary), protocols), strict=True):
        lines.append(
            f"{NAMES[window['n']]:>14}  {level(window):>9}  {'':17}{level(fixed):>9}  (of the "
            "training text)"
        )
    lines += [
        *textwrap.wrap(scored(summary), _WIDTH),
        *_unknown(summary),
        *_left_out(summary),
        "",
        *textwrap.wrap(summary["verdict"]["text"], _WIDTH),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _floors(found: Mapping[str, Any], protocol: str) -> Sequence[Mapping[str, Any]]:
    """What n-grams make of the tokens of a protocol; a file of an earlier version has none."""
    return found["verdict"].get("floors", {}).get(protocol, ())


def _bits(entry: Mapping[str, Any]) -> str:
    return _or("{:.4f}".format, entry["bits_per_byte"])


def scored(found: Mapping[str, Any]) -> str:
    """Say what text the numbers of an evaluation, or of a comparison, are of."""
    lengths = found.get("lengths") or [e["length"] for e in found["protocols"]["nonoverlapping"]]
    text = f"{_plural(found['num_windows'], 'window')} of {lengths[-1]} tokens from "
    text += _plural(found["num_documents"], found["unit"])
    if found.get("num_copies"):
        text += f" ({_plural(found['num_copies'], 'document')} left out as copies of others)"
    overlap = found.get("training_overlap")  # a file of an earlier version has none
    if overlap:
        text += f"; {overlap['share']:.1%} of the tokens are in {overlap['ngram']}-grams of the "
        text += "training text"
    return f"{text}."


def _left_out(found: Mapping[str, Any]) -> list[str]:
    """What was asked for and is not measured, said again beside the numbers."""
    return [row for line in found["left_out"] for row in textwrap.wrap(f"{line}.", _WIDTH)]


def _or(write: Callable[[float], str], number: float | None) -> str:
    return "not finite" if number is None else write(number)


def _unit(summary: Mapping[str, Any]) -> tuple[str, Callable[[Mapping[str, Any]], str]]:
    """The unit in which losses are written, and how: words have a perplexity, as in WikiText."""
    if summary["word_level"]:
        return "word ppl", lambda entry: _or("{:,.2f}".format, entry["perplexity"])
    return "bits/byte", lambda entry: _or("{:.4f}".format, entry["bits_per_byte"])


def _unknown(summary: Mapping[str, Any]) -> list[str]:
    """Say for how much of the text a token stands that the model need not tell from others."""
    if not summary["unknown_bytes"]:
        return []
    text = (
        f"{summary['unknown_bytes']:.1%} of the bytes are of what the vocabulary lacks, which the "
        "model predicts as unknown, not as what it is: losses are lower for it."
    )
    return textwrap.wrap(text, _WIDTH)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def evaluation_table(found: Mapping[str, Any]) -> str:
    """Write what `assess` found as plain text of at most 100 columns that ends with the verdict."""
    protocols = found["protocols"]
    writers = {
        "nonoverlapping": _lengths("nonoverlapping", "nonoverlapping windows"),
        "fixed_targets": _lengths(
            "fixed_targets", f"fixed targets, the last {found['num_targets']} of each window"
        ),
        "sliding_window": _lengths("sliding_window", "sliding window"),
        "by_position": _positions,
        "truncated_input": _truncated_input,
        "truncation": _truncation,
        "attention_mass": _mass,
        "needle": _needle,
        "recall": _recall,
    }
    lines = []
    for name, entries in protocols.items():
        lines += [*writers[name](entries, found), ""]
    notes = [scored(found)]
    notes += few_documents(found["unit"], found["num_documents"])
    notes += much_seen(found["training_overlap"]["share"])
    lines += [*textwrap.wrap(" ".join(notes), _WIDTH), *_unknown(found), *_left_out(found), ""]
    verdict = found["verdict"]
    lines += textwrap.wrap(verdict["text"], _WIDTH)
    if verdict["warning"]:
        lines += textwrap.wrap(f"Warning: {verdict['warning']}", _WIDTH)
    return "\n".join(line.rstrip() for line in lines)


def _lengths(protocol: str, title: str) -> Callable[[Any, Mapping[str, Any]], list[str]]:
    def write(entries: Any, found: Mapping[str, Any]) -> list[str]:
        train_length = found["train_length"]
        unit, level = _unit(found)
        lines = [f"{'tokens':>8}{'x':>6}{unit:>11}  loss change [95% interval]  {title}"]
        for entry in entries:
            length = entry["length"]
            change = "(training length)" if length == train_length else relative_change(entry)
            stride = f"  stride {entry['stride']}" if "stride" in entry else ""
            factor = length / train_length
            lines.append(f"{length:>8}{factor:>6g}{level(entry):>11}  {change}{stride}")
        lines += [
            f"{NAMES[floor['n']]:>14}{level(floor):>11}  (of the training text)"
            for floor in _floors(found, protocol)
        ]
        return lines

    return write


def _positions(by_position: Any, found: Mapping[str, Any]) -> list[str]:
    """About ten of the ranges."""
    entries = by_position["entries"]
    step = -(-len(entries) // 10)
    shown = entries[::-step][::-1]
    starts = "".join(f"{entry['start']:>8}" for entry in shown)
    unit, key, written = "bits/byte", "bits_per_byte", "{:.3f}".format
    if found["word_level"]:
        unit, key, written = "word ppl ", "perplexity", "{:.1f}".format
    values = "".join(f"{_or(written, entry[key]):>8}" for entry in shown)
    title = "loss from each position on, in all windows of the shortest length that holds it"
    return [title, f"position{starts}", f"{unit}{values[1:]}"]


def _truncated_input(entries: Any, found: Mapping[str, Any]) -> list[str]:
    return _cut(entries, found, "context", "whole input", "input cut to the last tokens")


def _truncation(entries: Any, found: Mapping[str, Any]) -> list[str]:
    lines = _cut(entries, found, "window", "all keys", "nearest keys alone seen in every layer")
    window, interval = (found["verdict"][f"layer_window{suffix}"] for suffix in ("", "_interval"))
    if window is None:
        return lines
    ends = "" if interval is None else f" [{interval[0]}, {interval[1]}]"
    return [*lines, f"No layer needs more than its nearest {window} keys{ends}."]


def _cut(entries: Any, found: Mapping[str, Any], what: str, nothing: str, title: str) -> list[str]:
    """Levels with each of the contexts or windows, and changes against the last, the largest."""
    unit, level = _unit(found)
    lines = [f"{what:>8}{unit:>17}  loss change [95% interval]  {title}"]
    for entry in entries:
        change = f"({nothing})" if entry is entries[-1] else relative_change(entry)
        lines.append(f"{entry[what]:>8}{level(entry):>17}  {change}")
    return lines


def _mass(mass: Any, found: Mapping[str, Any]) -> list[str]:
    """For each head the median over layers of the nearest keys that hold 90% of its attention."""
    index = mass["quantiles"].index(0.9)
    keys: dict[int, list[float | None]] = {}
    slope_keys: dict[int, list[float | None]] = {}
    for head in mass["heads"]:
        keys.setdefault(head["head"], []).append(head["keys"][index])
        of_slope = head["slope_keys"] and head["slope_keys"][index]
        slope_keys.setdefault(head["head"], []).append(of_slope)
    lines = [f"keys that hold 90% of attention at {mass['length']}, by head (median over layers)"]
    for name, by_head in (("measured", keys), ("bias alone", slope_keys)):
        row = [_median(of_layers) for of_layers in by_head.values()]
        if set(row) != {"-"}:
            lines += textwrap.wrap(
                f"{name:<12}" + "".join(f"{word:>8}" for word in row),
                _WIDTH,
                subsequent_indent=" " * 12,
                drop_whitespace=False,
            )
    return lines


def _median(values: Sequence[float | None]) -> str:
    """The median of what is known, "-" where nothing is."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f}" if known else "-"


def _needle(task: Any, found: Mapping[str, Any]) -> list[str]:
    entries = task["entries"]
    depths = sorted({entry["depth"] for entry in entries})
    lines = [
        f"needle found [95% interval]; by chance: {task['chance']:.0%}",
        f"{'tokens':>8}" + "".join(f"{f'depth {depth:g}':>14}" for depth in depths),
    ]
    for length in sorted({entry["length"] for entry in entries}):
        row = [entry for entry in entries if entry["length"] == length]
        lines.append(f"{length:>8}" + "".join(f"{_accuracy(entry):>14}" for entry in row))
    return lines


def _recall(task: Any, found: Mapping[str, Any]) -> list[str]:
    lines = [f"values found by their keys [95% interval]; by chance: {task['chance']:.0%}"]
    return lines + [f"{entry['length']:>8}{_accuracy(entry):>14}" for entry in task["entries"]]


def _accuracy(entry: Mapping[str, Any]) -> str:
    if entry["accuracy"] is None:
        return "not finite"
    low, high = entry["interval"]
    return f"{entry['accuracy']:.0%} [{100 * low:.0f},{100 * high:.0f}]"
