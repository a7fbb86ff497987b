"""The sections of a report on losses: lengths, positions, truncation, training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alibi_jax.evaluation import ngrams
from alibi_jax.evaluation.html.chart import Axis, Guides, Line, chart, legend, limits
from alibi_jax.evaluation.html.read import Comparison, Run
from alibi_jax.evaluation.html.tags import Cell, Html, join, lines, table, tag
from alibi_jax.evaluation.verdict import TOLERANCE, percent

NAMES = {
    "fixed_targets": "fixed targets",
    "nonoverlapping": "nonoverlapping windows",
    "sliding_window": "sliding window",
}
EXPLAINED = {
    "fixed_targets": "The same tokens, the last of every window, after contexts of each length. "
    "Only the context differs, so this says what longer context does.",
    "nonoverlapping": "All tokens of windows that stand one after the other. Longer windows have "
    "fewer tokens near their start, so this falls even where longer context does nothing.",
    "sliding_window": "Windows that overlap, so that every token scored has most of a window as "
    "context.",
}
MISSING = "not measured"


class Series(NamedTuple):
    """One row of the tables of losses: a run, or the seeds of a method."""

    name: str
    style: int
    train_length: int
    protocols: Mapping[str, Sequence[Mapping[str, Any]]]
    floors: Mapping[str, Any]  # n-grams by protocol; a file of an earlier version has none


def styles(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> dict[str, int]:
    """A style for each run, and for each method of a comparison."""
    groups = [run.group for run in runs]
    groups += [method["name"] for c in comparisons for method in c.numbers["methods"]]
    return {group: index for index, group in enumerate(dict.fromkeys(groups))}


def series_of(
    runs: Sequence[Run], comparisons: Sequence[Comparison], style: Mapping[str, int]
) -> list[Series]:
    """What was scored at several lengths."""
    found = [
        Series(
            run.name,
            style[run.group],
            run.evaluation["train_length"],
            run.evaluation["protocols"],
            run.evaluation["verdict"].get("floors", {}),
        )
        for run in runs
        if run.evaluation is not None
    ]
    for comparison in comparisons:
        prefix = f"{comparison.name}: " if len(comparisons) > 1 or runs else ""
        found += [
            Series(
                prefix + method["name"],
                style[method["name"]],
                comparison.numbers["train_length"],
                method["protocols"],
                comparison.numbers.get("floors", {}),
            )
            for method in comparison.numbers["methods"]
            if method["protocols"]
        ]
    return found


def losses(series: Sequence[Series]) -> Html | None:
    """The loss at each length, by protocol: curves, then numbers."""
    named = [name for name in EXPLAINED if any(s.protocols.get(name) for s in series)]
    if not named:
        return None
    curves = {name: [_levels(s, name) for s in series if s.protocols.get(name)] for name in named}
    changes = [_changes(s) for s in series if s.protocols.get("fixed_targets")]
    everything = [line for lines_ in curves.values() for line in lines_]
    bits = Axis("bits per byte", limits=_known_limits(everything))
    guides = Guides(vertical=_trained(series))
    charts = [
        chart(
            lines_,
            _LENGTH,
            bits,
            title=f"Loss, {NAMES[name]}",
            guides=guides._replace(horizontal=[*_floors(series, name).items()]),
        )
        for name, lines_ in curves.items()
        if _known_limits(lines_)
    ]
    if changes and _known_limits(changes):
        low, high = limits(changes)
        scale = "symlog" if max(-low, high) > 20 else "linear"
        charts.append(
            chart(
                changes,
                _LENGTH,
                Axis("change of the loss (%)", scale),
                title="Change against the training length, fixed targets (band: ±1%)",
                guides=guides._replace(band=100 * TOLERANCE),
            )
        )
    tables = [
        part
        for name in named
        for part in (tag("h3", NAMES[name]), tag("p", EXPLAINED[name]), _loss_table(series, name))
    ]
    note = tag(
        "p",
        small(
            "Shading is the 95% interval, over documents for a run and over seeds for a method of "
            "a comparison, cut off where it leaves the figure."
        ),
    )
    return join([tag("div", *charts, class_="charts"), legend(everything), note, *tables])


def _floors(series: Sequence[Series], protocol: str) -> dict[float, str]:
    """Bits per byte and names of the n-grams of all series, each value once."""
    return {
        floor["bits_per_byte"]: ngrams.NAMES[floor["n"]]
        for s in series
        for floor in s.floors.get(protocol, ())
    }


def tokens(length: float) -> str:
    """Write 2048 as 2k."""
    whole = int(length)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"


_LENGTH = Axis("window length (tokens)", "log", tokens)


def _known_limits(lines_: Sequence[Line]) -> tuple[float, float] | None:
    """The limits of curves; None where there is not one number."""
    return limits(lines_) if any(y is not None for line in lines_ for _, y in line.points) else None


def _trained(series: Iterable[Series]) -> tuple[float, str] | None:
    """The training length, where it is one."""
    lengths = {s.train_length for s in series}
    return (lengths.pop(), "training length") if len(lengths) == 1 else None


def bits_interval(entry: Mapping[str, Any]) -> list[float] | None:
    """The interval of a loss in bits per byte, as its level is."""
    if "bits_per_byte_interval" in entry:
        return entry["bits_per_byte_interval"]
    if entry["interval"] is None or not entry["nats_per_token"]:
        return None
    return [x * entry["bits_per_byte"] / entry["nats_per_token"] for x in entry["interval"]]


def _levels(series: Series, protocol: str) -> Line:
    entries = series.protocols[protocol]
    return Line(
        series.name,
        [(entry["length"], entry["bits_per_byte"]) for entry in entries],
        [bits_interval(entry) for entry in entries],
        series.style,
    )


def _changes(series: Series) -> Line:
    entries = series.protocols["fixed_targets"]
    return Line(
        series.name,
        [(entry["length"], _times(100, entry["relative_change"])) for entry in entries],
        [_percentages(entry["relative_change_interval"]) for entry in entries],
        series.style,
    )


def _percentages(interval: Sequence[float] | None) -> list[float] | None:
    return [100 * x for x in interval] if interval else None


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _loss_table(series: Sequence[Series], protocol: str) -> Html:
    lengths = sorted({e["length"] for s in series for e in s.protocols.get(protocol, ())})
    rows = []
    for s in series:
        by_length = {entry["length"]: entry for entry in s.protocols.get(protocol, ())}
        cells = [
            _loss_cell(by_length.get(length), trained=length == s.train_length)
            for length in lengths
        ]
        rows.append([s.name, *cells])
    for value, name in _floors(series, protocol).items():
        rows.append([f"{name} of the training text", *[number(value)] * len(lengths)])
    caption = f"Bits per byte, {NAMES[protocol]}: loss, 95% interval, change against the training "
    caption += "length"
    return table(caption, ["", *(f"{length:,} tokens" for length in lengths)], rows)


def _loss_cell(entry: Mapping[str, Any] | None, *, trained: bool) -> object:
    if entry is None:
        return MISSING
    parts = [number(entry["bits_per_byte"]), small(bounds(bits_interval(entry)))]
    if trained:
        return Cell(lines(*parts, small("training length")), "trained")
    change, interval = entry["relative_change"], entry["relative_change_interval"]
    if change is not None:
        parts.append(small(f"{percent(change)} {bounds(interval, percent)}"))
    return Cell(lines(*parts), "" if change is None or change <= TOLERANCE else "worse")


def number(value: float | None, written: Callable[[float], str] = "{:.4f}".format) -> str:
    """A number, or that there is none."""
    return "not finite" if value is None else written(value)


def bounds(
    interval: Sequence[float] | None, written: Callable[[float], str] = "{:.4f}".format
) -> str:
    """An interval, or nothing."""
    return f"[{written(interval[0])}, {written(interval[1])}]" if interval else ""


def small(content: str) -> Html:
    """Small print, or nothing."""
    return tag("small", content) if content.strip() else Html("")


def positions(runs: Sequence[Run], style: Mapping[str, int]) -> Html | None:
    """The loss at each position of a window."""
    found = [(run, data) for run, data in protocol(runs, "by_position") if data["entries"]]
    curves = [
        Line(
            run.group,
            [(entry["stop"], entry["bits_per_byte"]) for entry in data["entries"]],
            [bits_interval(entry) for entry in data["entries"]],
            style[run.group],
        )
        for run, data in found
    ]
    if not curves or _known_limits(curves) is None:
        return None
    trained = {run.evaluation["train_length"] for run, _ in found if run.evaluation}
    vertical = (trained.pop(), "training length") if len(trained) == 1 else None
    axis = Axis("position, to the end of each range (tokens)", "log", tokens)
    return join(
        [
            tag(
                "p",
                "The mean over ranges of positions, in all windows of the shortest length that has "
                "them. Far positions are of few texts, so small bumps there are of the text.",
            ),
            chart(
                curves,
                axis,
                Axis("bits per byte"),
                title="Loss by position",
                guides=Guides(vertical=vertical),
            ),
            legend(curves),
        ]
    )


def truncation(runs: Sequence[Run], style: Mapping[str, int]) -> Html | None:
    """The loss with the input cut, and with all keys beyond a distance masked."""
    parts = [
        _cut(
            runs,
            style,
            "truncated_input",
            "context",
            "The loss on fixed targets with no more than the last C tokens as input, against the "
            "whole input (the last column). Where the curve reaches zero, longer inputs stop "
            "helping; where it is below, they do harm.",
            ("C", "the input cut", "the whole input"),
        ),
        _cut(
            runs,
            style,
            "truncation",
            "window",
            "The same with the whole input, but every key at a distance of W or more masked in all "
            "layers: how far back a layer has to see. Layers pass on what they saw.",
            ("W", "truncated attention", "no mask"),
        ),
    ]
    found = [part for part in parts if part is not None]
    return join(found) if found else None


def _cut(
    runs: Sequence[Run],
    style: Mapping[str, int],
    name: str,
    setting: str,
    text: str,
    words: tuple[str, str, str],
) -> Html | None:
    """One way to cut: the protocol's `name`, its field `setting`, and the words of the captions."""
    found = protocol(runs, name)
    if not found:
        return None
    symbol, cut, whole = words
    curves, rows = [], []
    for run, entries in found:
        settings = [entry[setting] for entry in entries]
        changes = [_times(100, entry["relative_change"]) for entry in entries]
        curves.append(
            Line(run.group, list(zip(settings, changes, strict=True)), (), style[run.group])
        )
        cells = [lines(number(entry["bits_per_byte"]), small(_change(entry))) for entry in entries]
        rows.append((run.name, dict(zip(settings, cells, strict=True))))
    columns = sorted({value for _, cells in rows for value in cells})
    parts = [tag("p", text)]
    if _known_limits(curves):
        low, high = limits(curves)
        change = Axis("change of the loss (%)", "symlog" if max(-low, high) > 20 else "linear")
        axis = Axis(f"{symbol} (tokens)", "log", tokens)
        parts += [chart(curves, axis, change, title=f"Loss with {cut}"), legend(curves)]
    parts.append(
        table(
            f"Bits per byte with {cut}, and the change against {whole}",
            ["", *(f"{symbol} = {value:,}" for value in columns)],
            [[name, *(cells.get(value, MISSING) for value in columns)] for name, cells in rows],
        )
    )
    return join(parts)


def _change(entry: Mapping[str, Any]) -> str:
    if entry["relative_change"] is None:
        return ""
    interval = bounds(entry["relative_change_interval"], percent)
    return f"{percent(entry['relative_change'])} {interval}"


def protocol(runs: Sequence[Run], name: str) -> list[tuple[Run, Any]]:
    """The runs that were evaluated by a protocol, and what it found."""
    return [
        (run, run.evaluation["protocols"][name])
        for run in runs
        if run.evaluation is not None and run.evaluation["protocols"].get(name)
    ]


def training(runs: Sequence[Run], style: Mapping[str, int]) -> Html | None:
    """The loss while it was trained."""
    curves, dots = [], []
    for run in runs:
        trained = [(m["step"], m["bits_per_byte"]) for m in run.metrics if "bits_per_byte" in m]
        validated = [
            (m["step"], m["validation_bits_per_byte"])
            for m in run.metrics
            if "validation_bits_per_byte" in m
        ]
        if trained:
            curves.append(Line(run.group, trained, (), style[run.group], markers=False))
        if validated:
            dots.append(Line(run.group, validated, (), style[run.group]))
    if _known_limits(curves) is None:
        return None
    shared = Axis("bits per byte", limits=_known_limits(curves + dots))
    step = Axis("step", format="{:,.0f}".format)
    charts = [chart(curves, step, shared, title="Training loss")]
    if _known_limits(dots):
        charts.append(chart(dots, step, shared, title="Validation loss"))
    return join([tag("div", *charts, class_="charts"), legend(curves)])
