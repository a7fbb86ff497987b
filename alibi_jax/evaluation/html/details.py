"""The sections of a report beside losses: attention, retrieval, seeds, cost, configs, versions."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alibi_jax.evaluation.compare_table import TIME, milliseconds_range
from alibi_jax.evaluation.html.chart import Axis, Guides, Line, chart, legend
from alibi_jax.evaluation.html.losses import (
    MISSING,
    bounds,
    number,
    protocol,
    small,
    tokens,
)
from alibi_jax.evaluation.html.read import Comparison, Run
from alibi_jax.evaluation.html.tags import Cell, Html, join, lines, table, tag


def attention(runs: Sequence[Run]) -> Html | None:
    """How many of the nearest keys hold most of the attention of each head."""
    found = protocol(runs, "attention_mass")
    if not found:
        return None
    parts = [
        tag(
            "p",
            "How many of the nearest keys hold half, 90% and 99% of the attention of each head, "
            "and how many would if only its bias decided.",
        )
    ]
    for run, data in found:
        header = ["layer, head", *(f"{q:.0%}" for q in data["quantiles"]), "slope"]
        header += [f"{q:.0%}, bias alone" for q in data["quantiles"]]
        rows = []
        for head in data["heads"]:
            alone = head["slope_keys"] or [None] * len(data["quantiles"])
            rows.append(
                [
                    f"{head['layer']}, {head['head']}",
                    *(number(keys, "{:,.0f}".format) for keys in head["keys"]),
                    "none" if head["slope"] is None else f"{head['slope']:.4g}",
                    *("–" if keys is None else f"{keys:,}" for keys in alone),
                ]
            )
        caption = f"{run.name}: nearest keys, of {data['length']:,}"
        inside = tag("summary", caption), table(caption, header, rows)
        parts.append(tag("details", *inside, open="" if len(found) == 1 else None))
    return join(parts)


def retrieval(runs: Sequence[Run], style: Mapping[str, int]) -> Html | None:
    """Needles by length and depth, and the recall of pairs by length."""
    needles, recalls = protocol(runs, "needle"), protocol(runs, "recall")
    if not needles and not recalls:
        return None
    charts, curves = [], []
    for found, title in ((needles, "Needle, mean over depths"), (recalls, "Recall of pairs")):
        if found:
            own = [Line(run.group, _by_length(task), (), style[run.group]) for run, task in found]
            chance = {task["chance"] for _, task in found}
            horizontal = [(chance.pop(), "chance")] if len(chance) == 1 else ()
            percentage = Axis("accuracy", "linear", "{:.0%}".format, limits=(0.0, 1.0))
            length = Axis("window length (tokens)", "log", tokens)
            guides = Guides(horizontal=horizontal)
            charts.append(chart(own, length, percentage, title=title, guides=guides))
            curves += own
    explained = (
        "Symbols drawn at random are put into held-out text and asked for at its end. A model "
        "that does not find them is right by chance. Small models that were not trained for this "
        "may find nothing, within their training length too."
    )
    parts = [tag("p", explained), tag("div", *charts, class_="charts"), legend(curves)]
    parts += [_needle_table(run, task) for run, task in needles]
    if recalls:
        parts.append(_recall_table(recalls))
    return join(parts)


def _by_length(task: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    lengths = sorted({entry["length"] for entry in task["entries"]})
    found: list[tuple[float, float | None]] = []
    for length in lengths:
        rates = [e["accuracy"] for e in task["entries"] if e["length"] == length]
        found.append((length, None if None in rates else statistics.mean(rates)))
    return found


def _needle_table(run: Run, task: Mapping[str, Any]) -> Html:
    depths = sorted({entry["depth"] for entry in task["entries"]})
    cells: dict[int, dict[float, object]] = {}
    for entry in task["entries"]:
        cells.setdefault(entry["length"], {})[entry["depth"]] = _accuracy(entry, task["chance"])
    caption = f"{run.name}: needles found, by length and depth (0%: at the start of the text); "
    caption += f"chance is {task['chance']:.0%}"
    header = ["tokens", *(f"depth {depth:.0%}" for depth in depths)]
    rows = [[f"{n:,}", *(by.get(d, MISSING) for d in depths)] for n, by in sorted(cells.items())]
    return table(caption, header, rows)


def _recall_table(recalls: Sequence[tuple[Run, Mapping[str, Any]]]) -> Html:
    lengths = sorted({entry["length"] for _, task in recalls for entry in task["entries"]})
    rows = []
    for run, task in recalls:
        cells = {e["length"]: _accuracy(e, task["chance"]) for e in task["entries"]}
        rows.append([run.name, *(cells.get(n, MISSING) for n in lengths)])
    return table("Pairs recalled, by length", ["", *(f"{n:,} tokens" for n in lengths)], rows)


def _accuracy(entry: Mapping[str, Any], chance: float) -> Cell:
    """An accuracy, shaded by how far it is above chance, if it surely is."""
    if entry["accuracy"] is None:
        return Cell(number(None), "heat0")
    above = (entry["accuracy"] - chance) / (1 - chance) if entry["interval"][0] > chance else 0.0
    percent = "{:.0%}".format
    content = lines(percent(entry["accuracy"]), small(bounds(entry["interval"], percent)))
    return Cell(content, f"heat{math.ceil(4 * above)}")


def seeds(comparison: Comparison) -> Html | None:
    """Each method against the reference, paired by seed."""
    numbers = comparison.numbers
    if "bytes_per_token" not in numbers:  # no run has finished
        return None

    def in_bits(entry: Mapping[str, Any]) -> Callable[[float], str]:
        # A comparison of an earlier version has one number for all targets.
        bits = 1 / math.log(2) / entry.get("bytes_per_token", numbers["bytes_per_token"])
        return lambda nats: f"{bits * nats:+.4f}"

    rows = []
    for method in numbers["methods"]:
        for entry in method["protocols"].get("fixed_targets", ()):
            if entry.get("difference") is None:
                continue
            p_value, signed = entry["p_value"], in_bits(entry)
            rows.append(
                [
                    method["name"],
                    f"{entry['length']:,}",
                    signed(entry["difference"]),
                    bounds(entry["difference_interval"], signed) or "–",
                    bounds(entry["difference_document_interval"], signed) or "–",
                    "–" if p_value is None else f"{p_value:.2g}",
                    ", ".join(number(x, signed) for x in entry["difference_seeds"]),
                ]
            )
    if not rows:
        return None
    meanings = [
        join([tag("dt", name), tag("dd", meaning)])
        for name, meaning in numbers.get("meanings", {}).items()
    ]
    header = ["method", "tokens", "difference", "95% over seeds", "95% over documents", "p"]
    return join(
        [
            table(
                f"Against {numbers['reference']}, paired: bits per byte on fixed targets, below "
                "zero is better",
                [*header, "each seed"],
                rows,
            ),
            tag("details", tag("summary", "What the numbers are"), tag("dl", *meanings)),
        ]
    )


def cost(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Html | None:
    """Time and memory."""
    parts = []
    for comparison in comparisons:
        rows = [
            [
                method["name"],
                _known(method["parameters"], "{:,}".format),
                _known(method["seconds_per_step"], _milliseconds) + milliseconds_range(method),
                _known(method["memory_bytes"], lambda size: f"{size / 1e6:,.1f}"),
            ]
            for method in comparison.numbers["methods"]
        ]
        header = ["method", "parameters", "ms a step (median)", "MB a step on a device"]
        parts.append(table(f"Cost of training, {comparison.name}", header, rows))
        parts.append(tag("p", small(f"Time: {TIME}")))
    timed = [
        [run.name, _milliseconds(statistics.median(times))]
        for run in runs
        if (times := [m["step_seconds_p50"] for m in run.metrics if m.get("step_seconds_p50")])
    ]
    if timed:
        parts.append(table("Time of training", ["run", "ms a step (median)"], timed))
    return join(parts) if parts else None


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _known(value: Any, written: Callable[[Any], str]) -> str:
    return MISSING if value is None else written(value)


Configs = Mapping[str, Mapping[str, Any]]


def configs_of(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The config of every run, and of every method of a comparison."""
    found = {run.name: run.config for run in runs if run.config}
    for comparison in comparisons:
        named = comparison.configs or {comparison.name: comparison.numbers.get("config") or {}}
        trained = {run.group: run.config for run in comparison.runs if run.config}
        found |= {
            name: _completed(config, trained.get(name, {}))
            for name, config in named.items()
            if config
        }
    return found


def _completed(config: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a method, with what only its data said taken from that of a run."""
    return {
        section: {
            field: trained.get(section, {}).get(field) if value is None else value
            for field, value in fields.items()
        }
        for section, fields in config.items()
    }


def configs(given: Configs) -> Html | None:
    """What differs, then everything."""
    flat = {
        name: {
            f"{section}.{field}": _written(value)
            for section, fields in config.items()
            for field, value in fields.items()
        }
        for name, config in given.items()
    }
    if not flat:
        return None
    parts = []
    if len(flat) > 1:
        rows = _differing(flat)
        if rows:
            parts.append(table("Settings that differ", ["config.", *flat], rows))
        else:
            parts.append(tag("p", "All settings are the same."))
    for name, fields in flat.items():
        caption = f"All settings of {name}"
        rows = [[field, value] for field, value in fields.items()]
        inside = table(caption, ["config.", "value"], rows)
        parts.append(tag("details", tag("summary", caption), inside))
    return join(parts)


def _differing(columns: Mapping[str, Mapping[str, str]]) -> list[list[object]]:
    """Rows whose values are not all equal; those unlike the first are marked."""
    rows: list[list[object]] = []
    for field in dict.fromkeys(field for fields in columns.values() for field in fields):
        values = [fields.get(field, "–") for fields in columns.values()]
        if len(set(values)) > 1:
            marked = [v if v == values[0] else Cell(tag("mark", v), "") for v in values]
            rows.append([field, *marked])
    return rows


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def versions(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Html | None:
    """The software and the device behind every result."""
    found = {
        run.name: run.evaluation["versions"]
        for run in runs
        if run.evaluation and run.evaluation.get("versions")
    }
    found |= {c.name: c.numbers["versions"] for c in comparisons if c.numbers.get("versions")}
    if not found:
        return None
    names = dict.fromkeys(name for versions_ in found.values() for name in versions_)
    rows = [[name, *(str(v.get(name, "–")) for v in found.values())] for name in names]
    return table("Versions", ["", *found], rows)


def missing(runs: Sequence[Run]) -> Html | None:
    """What this report would show if it were there."""
    lacking: dict[str, list[str]] = {}
    for run in runs:
        absent = [*run.missing, *(run.evaluation or {}).get("left_out", ())]
        if absent:
            lacking.setdefault("; ".join(absent), []).append(run.name)
    items = [
        tag("li", tag("strong", ", ".join(names)), ": ", absent)
        for absent, names in lacking.items()
    ]
    return tag("ul", *items) if items else None
