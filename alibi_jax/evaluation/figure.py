"""The figure of an evaluation beyond the training length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_jax.evaluation.ngrams import NAMES
from alibi_jax.evaluation.verdict import TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Three of Wong's colours (Nature Methods 8, 441, 2011): told apart with any colour vision, and in
# grey by lightness, marker and dash.
STYLES: dict[str, dict[str, Any]] = {
    "nonoverlapping": {
        "label": "nonoverlapping windows",
        "color": "#E69F00",
        "marker": "s",
        "linestyle": (0, (4, 1.5)),
        "markerfacecolor": "white",
    },
    "fixed_targets": {
        "label": "fixed targets",
        "color": "#0072B2",
        "marker": "o",
        "linestyle": "-",
    },
    "sliding_window": {
        "label": "sliding window",
        "color": "#009E73",
        "marker": "^",
        "linestyle": (0, (1, 1)),
    },
}
_SIZE = (6.9, 2.6)  # inches; the text width of a two-column page, so that 8 pt print as 8 pt
_SYMLOG_FROM = 20.0  # percent; beyond this a linear axis would hide where the loss still holds


def extrapolation_figure(summary: Mapping[str, Any], path: Path, title: str | None = None) -> None:
    """Draw the loss against the window length, as a level and as a change.

    Left: bits per byte. Right: relative change of the loss against the training length, where the
    grey band is within 1% of it. Shading is the 95% interval over documents.

    Args:
        summary: From `summarize`, or read from `extrapolation.json`.
        path: The file to write; its suffix sets the format.
        title: A line above the figure, such as "quickstart: alibi, trained at 128 tokens".
    """
    # Matplotlib takes a second to import, so only who draws pays for it. `Figure` without pyplot
    # keeps no global state and needs no display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        level, change = figure.subplots(1, 2)
        for name in ("nonoverlapping", "fixed_targets"):
            entries, style = summary["protocols"][name], STYLES[name]
            curve(level, entries, "bits_per_byte", "bits_per_byte_interval", 1, style)
            curve(change, entries, "relative_change", "relative_change_interval", 100, style)
        lengths = [entry["length"] for entry in summary["protocols"]["fixed_targets"]]
        for axes in (level, change):
            length_axis(axes, lengths, summary["train_length"])
            axes.annotate(
                "training length",
                (summary["train_length"], 1),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 2),
                textcoords="offset points",
                color="0.3",
                fontsize=7,
            )
        floor_lines(level, summary["verdict"])
        level.set_ylabel("bits per byte")
        level.legend(frameon=False)
        change_axis(change)
        if title is not None:
            figure.suptitle(title, fontsize=9)
        save(figure, path)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure, all of it or nothing."""
    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, dpi=200, format=path.suffix[1:])
    unfinished.replace(path)


def curve(
    axes: "Axes",
    entries: Sequence[Mapping[str, Any]],
    value: str,
    interval: str,
    scale: float,
    style: Mapping[str, Any],
) -> None:
    """Draw one protocol; numbers that are not finite leave a gap."""
    lengths = [entry["length"] for entry in entries]
    values = np.array([entry[value] for entry in entries], np.float64) * scale
    bounds = np.array([entry[interval] or (np.nan, np.nan) for entry in entries]) * scale
    axes.plot(lengths, values, markersize=4, linewidth=1.3, **style)
    axes.fill_between(lengths, *bounds.T, color=style["color"], alpha=0.15, linewidth=0)


def floor_lines(axes: "Axes", verdict: Mapping[str, Any]) -> None:
    """Draw what n-grams of the training text make of the same tokens, in the protocol's colour.

    The axis reaches as far as the lowest; the others are seen where it reaches them.
    """
    floors = [
        (floor["bits_per_byte"], NAMES[floor["n"]], STYLES[protocol]["color"])
        for protocol in ("nonoverlapping", "fixed_targets")
        for floor in verdict.get("floors", {}).get(protocol, ())  # earlier versions have none
    ]
    if not floors:
        return
    lowest = min(floors)[0]
    curves = axes.dataLim.intervaly
    seen = [*curves[np.isfinite(curves)], lowest]
    margin = 0.05 * (max(seen) - min(seen)) or 1.0
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    for value, name, color in floors:
        axes.axhline(value, color=color, linestyle="--", linewidth=0.8, zorder=1)
        axes.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 1),
            textcoords="offset points",
            horizontalalignment="right",
            color=color,
            fontsize=6,
            annotation_clip=True,
        )


def length_axis(axes: "Axes", lengths: Sequence[int], train_length: int) -> None:
    """Make x logarithmic in the lengths evaluated, with the training length marked."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
    axes.set_xticks(lengths, [tokens_text(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("window length (tokens)")
    axes.axvline(train_length, color="0.3", linestyle=":", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)


def change_axis(axes: "Axes") -> None:
    """Show at least ±2%, so that the ±1% band is seen and noise does not look like a trend."""
    axes.set_ylabel("change of the loss (%)")
    low, high = axes.dataLim.intervaly
    low, high = min(1.15 * low, -2), max(1.15 * high, 2)
    if high > _SYMLOG_FROM:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = 1.5 * low, 1.5 * high
    axes.set_ylim(low, high)
    tolerance = 100 * TOLERANCE
    axes.axhspan(-tolerance, tolerance, color="0.92", linewidth=0, zorder=0)
    axes.annotate(
        f"±{tolerance:g}%",
        (1, tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -2),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="top",
        color="0.3",
        fontsize=7,
    )


def tokens_text(length: int) -> str:
    """Write a number of tokens in short: 128, 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
