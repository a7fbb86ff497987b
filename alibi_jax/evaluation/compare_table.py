"""The tables of a comparison, as Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alibi_jax.evaluation.compare_summary import MEANINGS
from alibi_jax.evaluation.ngrams import NAMES
from alibi_jax.evaluation.tables import scored
from alibi_jax.evaluation.verdict import percent

_TITLES = {
    "fixed_targets": "Fixed targets: the same last {num_targets} tokens of every window, after "
    "contexts of each length",
    "nonoverlapping": "Nonoverlapping windows: all tokens (longer windows have fewer tokens near "
    "their start, so this falls with length even where more context does nothing)",
}
TIME = (
    "median step, and in brackets where 80% of a run's steps lie, from the fastest run to the "
    "slowest. Runs are timed as they train, one after the other, with all else that the machine "
    "does then: methods whose brackets overlap cannot be told apart, nor those of one seed, where "
    "the order may decide."
)
Row = Sequence[str]


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """What `comparison.md` holds.

    Args:
      comparison: from `compare_summary.summarize`, or read from `comparison.json`.
    """
    methods = [method for method in comparison["methods"] if method["protocols"]]
    parts = [_heading(comparison)]
    if methods:
        parts.append("\n".join(f"- {sentence}" for sentence in findings(comparison)))
        for protocol, title in _TITLES.items():
            parts.append(f"## {title.format(**comparison)}\n\n" + _losses(comparison, protocol))
        parts.append(_differences(comparison, methods))
    parts += [_verdicts(comparison), _costs(comparison), _meanings(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(comparison: Mapping[str, Any]) -> str:
    names = [method["name"] for method in comparison["methods"]]
    seeds = _plural(len(comparison["seeds"]), "seed")
    text = f"# {', '.join(names)}: {seeds}"
    if comparison["lengths"]:
        text += f", trained at {comparison['train_length']} tokens"
    missing = [f"{run['method']} seed {run['seed']}" for run in comparison["missing"]]
    if missing:
        text += f"\n\n**Partial: {len(missing)} of {comparison['num_runs']} runs are missing: "
        text += f"{', '.join(missing)}.**"
    failed = [
        f"{method['name']} seed {run['seed']} {run['status']} ({run['message']})"
        for method in comparison["methods"]
        for run in method["runs"]
        if run["status"] != "finished"
    ]
    if failed:
        text += f"\n\n**Not finished: {'; '.join(failed)}.**"
    return text


def findings(comparison: Mapping[str, Any]) -> list[str]:
    """Sentences on who leads, by how much and how far, and on curves that alone would mislead.

    Args:
      comparison: as for `comparison_table`.
    """
    methods = {method["name"]: method for method in comparison["methods"] if method["protocols"]}
    leaders = comparison.get("leaders", ())  # a file of an earlier version has none
    found = [_lead(leader, comparison) for leader in leaders]
    ahead = {}  # at the training length and not at the longest: of whom
    if len({leader["method"] for leader in leaders}) == 2:
        ahead[leaders[0]["method"]] = "ahead"
    for name, method in methods.items():
        entries = method["protocols"]["fixed_targets"]
        gaps = [entries[index].get("difference", 0.0) for index in (0, -1)]
        if gaps[0] is not None and gaps[0] < 0 and (gaps[1] is None or gaps[1] > 0):
            ahead.setdefault(name, f"ahead of {comparison['reference']}")
    for name, whom in ahead.items():
        first, last = (methods[name]["protocols"]["fixed_targets"][index] for index in (0, -1))
        change = last["relative_change"]
        to = "is not finite" if change is None else f"has changed by {percent(change)}"
        found.append(
            f"{name} is {whom} at {first['length']} tokens and not at {last['length']}: there its "
            f"loss on the same targets {to}. A lead at the training length says nothing about "
            "longer inputs."
        )
    unlearned = [name for name, m in methods.items() if m["verdict"].get("learned") is False]
    if unlearned:
        found.append(
            f"Not judged: {', '.join(unlearned)}. A loss that is not finite, or not clearly below "
            "that of short n-grams of the training text, says nothing about longer inputs, however "
            "it changes with length."
        )
    misleading = [
        name
        for name, method in methods.items()
        if all(method["verdict"].get("warning_seeds") or [None])
    ]
    if misleading:
        found.append(
            f"Nonoverlapping windows alone would mislead for {', '.join(misleading)}: their loss "
            "falls with length mainly because longer windows have fewer tokens near their start. "
            "On the same targets longer context gains less than half of that, or nothing that can "
            "be measured."
        )
    return found


def _lead(leader: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    (method,) = (m for m in comparison["methods"] if m["name"] == leader["method"])
    entries = method["protocols"]["fixed_targets"]
    (level,) = (entry for entry in entries if entry["length"] == leader["length"])
    trained = leader["length"] == comparison["train_length"]
    where = "the training length" if trained else "the longest"
    text = (
        f"At {leader['length']} tokens ({where}) {leader['method']} has the lowest loss on fixed "
        f"targets, {level['bits_per_byte']:.4f} bits per byte"
    )
    if leader.get("difference") is None:
        return f"{text}."
    bits = _bits(level)
    intervals = {
        "seeds": leader["difference_interval"],
        "documents": leader["difference_document_interval"],
    }
    known = {what: bounds for what, bounds in intervals.items() if bounds is not None}
    text += f": {_signed(leader['difference'], bits)}"
    text += ",".join(f" {_bounds(bounds, bits)} over {what}" for what, bounds in known.items())
    text += f", against {leader['next']}, the next"
    doubts = [f"over {what}" for what, bounds in known.items() if bounds[0] <= 0 <= bounds[1]]
    if doubts:
        text += f" (not certain: an interval {' and one '.join(doubts)} contains zero)"
    if len(leader["difference_seeds"]) == 1:
        text += ", in one seed, and another may say otherwise"
    return f"{text}."


def _losses(comparison: Mapping[str, Any], protocol: str) -> str:
    """Bits per byte by method and length: mean ± half the interval over seeds."""
    lengths = comparison["lengths"]
    factors = [f"{length} ({length / comparison['train_length']:g}x)" for length in lengths]
    rows = []
    for method in comparison["methods"]:
        entries = method["protocols"].get(protocol)
        count = sum(run["status"] == "finished" for run in method["runs"])
        cells = [_level(entry) for entry in entries] if entries else ["missing"] * len(lengths)
        rows.append([method["name"], str(count), *cells])
    for floor in comparison.get("floors", {}).get(protocol, ()):  # earlier versions have none
        name = f"{NAMES[floor['n']]} of the training text"
        rows.append([name, "–", *[f"{floor['bits_per_byte']:.4f}"] * len(lengths)])
    return "Bits per byte, mean ± half of the 95% interval over seeds.\n\n" + _markdown(
        ["method", "seeds", *factors], rows
    )


def _level(entry: Mapping[str, Any]) -> str:
    value, bounds = entry["bits_per_byte"], entry["bits_per_byte_interval"]
    if value is None:
        return "not finite"
    return f"{value:.4f}" + ("" if bounds is None else f" ± {(bounds[1] - bounds[0]) / 2:.4f}")


def _differences(comparison: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> str:
    """Each method minus the reference, at the training length and at the longest."""
    ends = list(dict.fromkeys((0, len(comparison["lengths"]) - 1)))
    rows = []
    for method in methods:
        entries = method["protocols"]["fixed_targets"]
        if "difference" not in entries[0]:
            continue
        row = [method["name"], str(len(entries[0]["difference_seeds"]))]
        for index in ends:
            entry = entries[index]
            bits = _bits(entry)
            documents = entry["difference_document_interval"]
            row += [
                _signed(entry["difference"], bits),
                _bounds(entry["difference_interval"], bits),
                _bounds(documents, bits),
                "–" if entry["p_value"] is None else f"{entry['p_value']:.2g}",
            ]
        rows.append(row)
    if not rows:
        return ""
    header = ["method", "pairs"]
    for index in ends:
        header += [f"at {comparison['lengths'][index]}", "95% over seeds", "95% over documents"]
        header += ["p"]
    return (
        f"## Against {comparison['reference']}, paired\n\nDifference on fixed targets, bits per "
        "byte; below zero is better.\n\n" + _markdown(header, rows)
    )


def _verdicts(comparison: Mapping[str, Any]) -> str:
    rows = []
    for method in comparison["methods"]:
        verdict = method["verdict"]
        rows.append([method["name"], verdict["text"] if verdict else _why(method)])
    return (
        "## Verdict\n\nOn fixed targets; a loss holds while it is at most 1% above that at the "
        "training length. Brackets: 95% intervals.\n\n" + _markdown(["method", "verdict"], rows)
    )


def _why(method: Mapping[str, Any]) -> str:
    states = {run["status"] for run in method["runs"]}
    return " and ".join(sorted(states)) if states else "missing"


def _costs(comparison: Mapping[str, Any]) -> str:
    rows = [
        [
            method["name"],
            _or_missing(method["parameters"], lambda n: f"{n:,}"),
            _or_missing(method["seconds_per_step"], lambda t: f"{1e3 * t:,.1f}")
            + milliseconds_range(method),
            _or_missing(method["memory_bytes"], lambda n: f"{n / 1e6:,.1f}"),
        ]
        for method in comparison["methods"]
    ]
    header = ["method", "parameters", "ms a step", "MB a step"]
    return (
        f"## Cost\n\nTime: {TIME} Memory: state, batch and temporaries of the compiled training "
        "step on one device.\n\n" + _markdown(header, rows)
    )


def milliseconds_range(method: Mapping[str, Any]) -> str:
    """Write the range of a method's steps after their median; an earlier version has none."""
    bounds = method.get("seconds_per_step_range")
    return f" [{1e3 * bounds[0]:,.1f}, {1e3 * bounds[1]:,.1f}]" if bounds else ""


def _meanings(comparison: Mapping[str, Any]) -> str:
    text = "\n".join(f"- `{name}`: {meaning}." for name, meaning in MEANINGS.items())
    if comparison["lengths"]:
        text += "\n\nAll methods and lengths score the same tokens: "
        text += scored(comparison)
    if comparison["left_out"]:
        text += "\n\n" + "\n".join(f"- {line}" for line in comparison["left_out"])
    return f"## What the numbers are\n\n{text}"


def _markdown(header: Row, rows: Sequence[Row]) -> str:
    """A table whose columns line up in plain text as well."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Row) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _or_missing(value: Any, write: Callable[[Any], str]) -> str:
    return "missing" if value is None else write(value)


def _bits(entry: Mapping[str, Any]) -> float:
    """Bits per byte for each nat per token of the targets of an entry."""
    return 1 / (math.log(2) * entry["bytes_per_token"])


def _signed(value: float | None, factor: float) -> str:
    return "not finite" if value is None else f"{factor * value:+.4f}"


def _bounds(bounds: Sequence[float] | None, factor: float) -> str:
    return "–" if bounds is None else f"[{factor * bounds[0]:+.4f}, {factor * bounds[1]:+.4f}]"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
