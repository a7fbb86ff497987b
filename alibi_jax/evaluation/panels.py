"""The figure of `alibi eval`: a panel for each thing that the protocols measure."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_jax.evaluation.figure import (
    STYLES,
    change_axis,
    curve,
    floor_lines,
    length_axis,
    save,
    tokens_text,
)
from alibi_jax.evaluation.judgement import CONTEXT_TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (6.9, 4.6)  # inches
_COLUMNS = 3
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "0.3"
_BY_LENGTH = ("nonoverlapping", "sliding_window", "fixed_targets")


def evaluation_figure(found: Mapping[str, Any], path: Path, title: str | None = None) -> None:
    """Draw what was measured, and leave panels empty where nothing was.

    Args:
        found: From `assess`, or read from `evaluation.json`.
        path: The file to write; its suffix sets the format.
        title: A line above the figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    protocols = found["protocols"]
    of_panels: list[tuple[Callable[[Axes, Mapping[str, Any]], None], tuple[str, ...]]] = [
        (_levels, _BY_LENGTH),
        (_changes, _BY_LENGTH),
        (_by_position, ("by_position",)),
        (_truncation, ("truncated_input", "truncation")),
        (_mass, ("attention_mass",)),
        (_retrieval, ("needle", "recall")),
    ]
    drawn = [draw for draw, names in of_panels if any(name in protocols for name in names)]
    rows = -(-len(drawn) // _COLUMNS)
    columns = min(_COLUMNS, len(drawn))
    size = (_SIZE[0] * columns / _COLUMNS, _SIZE[1] * rows / 2)
    with rc_context({"font.size": 7, "axes.titlesize": 7.5, "legend.fontsize": 6}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, draw in zip(axes, drawn, strict=False):
            draw(panel, found)
        for empty in axes[len(drawn) :]:
            empty.set_axis_off()
        if title is not None:
            figure.suptitle(title, fontsize=9)
        save(figure, path)


def _present(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found["protocols"][name] for name in _BY_LENGTH if name in found["protocols"]}


def _levels(axes: "Axes", found: Mapping[str, Any]) -> None:
    present = _present(found)
    for name, entries in present.items():
        curve(axes, entries, "bits_per_byte", "bits_per_byte_interval", 1, STYLES[name])
    floor_lines(axes, found["verdict"])
    length_axis(axes, _lengths(present), found["train_length"])
    axes.set_ylabel("bits per byte")
    axes.set_title("loss")
    axes.legend(frameon=False)


def _changes(axes: "Axes", found: Mapping[str, Any]) -> None:
    present = _present(found)
    for name, entries in present.items():
        curve(axes, entries, "relative_change", "relative_change_interval", 100, STYLES[name])
    length_axis(axes, _lengths(present), found["train_length"])
    change_axis(axes)
    axes.set_title("change from the training length, paired")


def _lengths(present: Mapping[str, Any]) -> list[int]:
    return sorted({entry["length"] for entries in present.values() for entry in entries})


def _by_position(axes: "Axes", found: Mapping[str, Any]) -> None:
    entries = found["protocols"]["by_position"]["entries"]
    # A range is drawn at its geometric middle, positions counted from 1.
    middles = [np.sqrt((entry["start"] + 1) * entry["stop"]) for entry in entries]
    at = [{**entry, "length": middle} for entry, middle in zip(entries, middles, strict=True)]
    style = {"color": _BLUE, "marker": "."}
    curve(axes, at, "bits_per_byte", "bits_per_byte_interval", 1, style)
    axes.set_xscale("log", base=2)
    axes.set_xlim(middles[0] / 1.4, middles[-1] * 1.4)  # also where no loss is finite
    _thin_ticks(axes, found["protocols"]["by_position"]["length"])
    axes.axvline(found["train_length"], color=_GREY, linestyle=":", linewidth=1)
    _note(axes, found["train_length"], "training length")
    axes.set_xlabel("position (tokens of context)")
    axes.set_ylabel("bits per byte")
    axes.set_title("loss by position")


def _truncation(axes: "Axes", found: Mapping[str, Any]) -> None:
    settings: list[int] = []
    for name, what, style in (
        ("truncated_input", "context", {"label": "last tokens", "color": _BLUE, "marker": "o"}),
        (
            "truncation",
            "window",
            {"label": "keys of each layer", "color": "#009E73", "marker": "^", "linestyle": ":"},
        ),
    ):
        if name in found["protocols"]:
            entries = [{**e, "length": e[what]} for e in found["protocols"][name]]
            curve(axes, entries, "relative_change", "relative_change_interval", 100, style)
            settings += [e["length"] for e in entries]
    shortest, longest = min(settings), max(settings)
    axes.set_xscale("log", base=2)
    axes.set_xlim(shortest / 1.4, longest * 1.4)
    _thin_ticks(axes, longest, shortest)
    axes.axhspan(0, 100 * CONTEXT_TOLERANCE, color="0.92", linewidth=0, zorder=0)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(1.15 * low, -CONTEXT_TOLERANCE * 100), max(1.15 * high, 1))
    used, interval = (found["verdict"][f"uses_context_to{suffix}"] for suffix in ("", "_interval"))
    if used is not None:
        axes.axvline(used, color=_ORANGE, linestyle="--", linewidth=1)
        axes.axvspan(*(interval or (used, used)), color=_ORANGE, alpha=0.15, linewidth=0)
        _note(axes, used, f"uses {tokens_text(used)}")
    axes.set_xlabel("nearest tokens left")
    axes.set_ylabel("loss above that with all (%)")
    axes.set_title(f"truncated context, of {tokens_text(int(longest))}")
    axes.legend(frameon=False, loc="center right")


def _mass(axes: "Axes", found: Mapping[str, Any]) -> None:
    mass = found["protocols"]["attention_mass"]
    heads = mass["heads"]
    styles = zip(mass["quantiles"], (_ORANGE, _BLUE, "#009E73"), ("v", "o", "^"), strict=True)
    for index, (quantile, color, marker) in enumerate(styles):
        number = [head["head"] for head in heads]
        keys = [np.nan if head["keys"][index] is None else head["keys"][index] for head in heads]
        axes.scatter(number, keys, 9, color=color, marker=marker, alpha=0.7, linewidths=0)
        sloped = {head["head"]: head["slope_keys"] for head in heads if head["slope_keys"]}
        expected = [sloped[head][index] for head in sorted(sloped)]
        axes.plot(sorted(sloped), expected, color=color, linewidth=1, label=f"{quantile:.0%}")
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.7, 1.4 * mass["length"])
    _thin_ticks(axes, mass["length"], axis="y")
    axes.set_xlabel("head")
    axes.set_ylabel("nearest keys (tokens)")
    sloped_title = "; line: bias alone" if any(head["slope_keys"] for head in heads) else ""
    axes.set_title(f"share of attention{sloped_title}")
    count = max(head["head"] for head in heads) + 1
    axes.set_xticks(range(0, count, -(-count // 12)))
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles, [f"{q:.0%}" for q in mass["quantiles"]], frameon=False, loc="best")


def _retrieval(axes: "Axes", found: Mapping[str, Any]) -> None:
    """Accuracy by length, a row for each depth and one for recall; chance is marked on the bar."""
    tasks = {n: found["protocols"][n] for n in ("needle", "recall") if n in found["protocols"]}
    lengths = sorted({entry["length"] for task in tasks.values() for entry in task["entries"]})
    rows: dict[str, dict[int, float | None]] = {}
    for name, task in tasks.items():
        for entry in task["entries"]:
            label = f"depth {entry['depth']:g}" if name == "needle" else "recall"
            rows.setdefault(label, {})[entry["length"]] = entry["accuracy"]
    cells = [[row.get(length) for length in lengths] for row in rows.values()]
    grid = np.array(cells, np.float64)  # None, not measured or not finite, is nan and stays empty
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "black" if value > 0.6 else "white"
            text = f"{100 * value:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=6)
    axes.set_xticks(range(len(lengths)), [tokens_text(length) for length in lengths])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("length (tokens)")
    chance = next(iter(tasks.values()))["chance"]
    axes.set_title(f"retrieved (%), chance {chance:.0%}")
    bar = axes.figure.colorbar(image, ax=axes, ticks=[0, chance, 1])
    bar.ax.set_yticklabels(["0", "chance", "1"])
    bar.ax.axhline(chance, color="white", linewidth=1)


def _note(axes: "Axes", x: float, text: str) -> None:
    """Write at the top of a vertical line, on the side that has more room."""
    start, stop = axes.get_xlim()
    left = x > np.sqrt(start * stop)  # the axis is logarithmic
    axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-2 if left else 2, -2),
        textcoords="offset points",
        horizontalalignment="right" if left else "left",
        verticalalignment="top",
        color=_GREY,
        fontsize=6,
    )


def _thin_ticks(axes: "Axes", last: float, first: float = 1, axis: str = "x") -> None:
    """At most six ticks, at powers of two."""
    exponents = np.arange(np.ceil(np.log2(first)), np.log2(last) + 0.01)
    step = int(np.ceil(len(exponents) / 6))
    ticks = (2.0 ** exponents[::-step][::-1]).astype(int)
    getattr(axes, f"set_{axis}ticks")(ticks, [tokens_text(tick) for tick in ticks])
    getattr(axes, f"set_{axis}ticks")([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
