"""The figure of a comparison, in the style of Figure 1 of Press et al. (ICLR 2022)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_jax.evaluation.figure import save
from alibi_jax.evaluation.ngrams import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Wong's colours (Nature Methods 8, 441, 2011), with grey for his yellow, which is faint on white.
# Printed in grey, methods are told apart by marker and dash.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
_TITLES = {"nonoverlapping": "nonoverlapping windows", "fixed_targets": "fixed targets"}
_SIZE = (6.9, 3.0)  # inches; the text width of a two-column page, so that 8 pt print as 8 pt
_SMALL, _MEAN_WIDTH = 6, 0.53  # points; of a character, in its size
_LONG_NAME = 20  # characters
_BAND = 0.18  # opacity
_ABOVE_BEST, _ABOVE_WORST = 1.5, 1.08  # the axis reaches so far above them at the training length


def comparison_figure(comparison: Mapping[str, Any], path: Path) -> None:
    """Draws bits per byte against the evaluation length, one line a method.

    Left: nonoverlapping windows. Right: fixed targets. A line is the mean over seeds, its band
    reaches from the lowest seed to the highest. Both axes are logarithmic. A curve that rises far
    above what any method has at the training length leaves through the top, with a triangle where
    it does and its last value under the title.

    Args:
      comparison: from `compare_summary.summarize`, or read from `comparison.json`.
      path: the file to write; its suffix sets the format.
    """
    save(drawn(comparison), path)


def drawn(comparison: Mapping[str, Any]) -> "Figure":
    """The figure that `comparison_figure` writes."""
    # Matplotlib takes a second to import. `Figure` without pyplot keeps no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    methods = [
        (method, _style(index, method["name"] == comparison["reference"]))
        for index, method in enumerate(comparison["methods"])
        if method["protocols"]
    ]
    with rc_context({"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        panels[0].set_ylabel("bits per byte")
        done, planned = comparison["num_finished"], comparison["num_runs"]
        if done < planned:
            figure.suptitle(f"partial: {done} of {planned} runs are finished", fontsize=8)
        if not methods:
            return figure
        floors = comparison.get("floors", {})  # an earlier version has none
        low, high = _limits([method for method, _ in methods], floors)
        cut = {}
        for axes, protocol in zip(panels, _TITLES, strict=True):
            _length_axis(axes, comparison["lengths"], comparison["train_length"])
            _loss_axis(axes, low, high)
            _floors(axes, floors.get(protocol, ()))
            of_methods = [
                _curve(axes, method["name"], method["protocols"][protocol], style, high)
                for method, style in methods
            ]
            cut[protocol] = [text for text in of_methods if text]
        handles, names = panels[0].get_legend_handles_labels()
        levels = [method["protocols"]["fixed_targets"][0] for method, _ in methods]
        if any(len(level["bits_per_byte_seeds"]) > 1 for level in levels):
            handles.append(Patch(color="0.5", alpha=_BAND, linewidth=0))
            names.append("lowest to highest seed")
        figure.legend(handles, map(_label, names), loc="outside right upper", frameon=False)
        figure.draw_without_rendering()  # lays out, so that the panels' width is known
        for axes, (protocol, title) in zip(panels, _TITLES.items(), strict=True):
            _title(axes, title, cut[protocol], comparison["lengths"][-1])
    return figure


def _label(name: str) -> str:
    """A name in the legend; a long one takes a line a setting and leaves the panels their width."""
    return name if len(name) <= _LONG_NAME else name.replace("+", "\n   +")


def _style(index: int, is_reference: bool) -> dict[str, Any]:
    """Colour, marker and dash of the method with this number; all three repeat after 360."""
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 1.8 if is_reference else 1.1,
        "markersize": 4,
        "markerfacecolor": "white" if index % 2 else _COLORS[index % len(_COLORS)],
        "zorder": 3 if is_reference else 2,
    }


def _floors(axes: "Axes", floors: Sequence[Mapping[str, Any]]) -> None:
    """Dashed lines at n-grams of the training text, where the axis reaches them."""
    for floor in floors:
        value = floor["bits_per_byte"]
        axes.axhline(value, color="0.3", linestyle="--", linewidth=0.8, zorder=1)
        axes.annotate(
            NAMES[floor["n"]],
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 1),
            textcoords="offset points",
            horizontalalignment="right",
            color="0.3",
            fontsize=_SMALL,
            annotation_clip=True,
        )


def _limits(
    methods: Sequence[Mapping[str, Any]], floors: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[float, float]:
    """The range of bits per byte that both panels show: all but what rises, and lowest floors."""
    entries = [entry for method in methods for p in _TITLES for entry in method["protocols"][p]]
    values = [entry["bits_per_byte"] for entry in entries if entry["bits_per_byte"]]
    at_training_length = [
        method["protocols"][p][0]["bits_per_byte"] or np.nan for method in methods for p in _TITLES
    ]
    if not np.isfinite(at_training_length).any():
        return 1.0, 8.0
    best, worst = np.nanmin(at_training_length), np.nanmax(at_training_length)
    lowest = [min(f["bits_per_byte"] for f in entries) for entries in floors.values() if entries]
    high = min(max(_ABOVE_BEST * best, _ABOVE_WORST * worst), 1.03 * max(values + lowest))
    return 0.98 * min(values + lowest), float(max([high, *(1.03 * floor for floor in lowest)]))


def _curve(
    axes: "Axes",
    name: str,
    entries: Sequence[Mapping[str, Any]],
    style: dict[str, Any],
    high: float,
) -> str | None:
    """Draws a method; if it leaves through the top, returns its name and last value."""
    lengths = np.array([entry["length"] for entry in entries], np.float64)
    seeds = np.array([entry["bits_per_byte_seeds"] for entry in entries], np.float64)
    seeds = np.where(np.isfinite(seeds), seeds, 1e3 * high)  # what is not finite is far above
    values = seeds.mean(axis=1)
    axes.plot(lengths, values, label=name, **style)
    low, up = seeds.min(axis=1), seeds.max(axis=1)
    axes.fill_between(lengths, low, up, color=style["color"], alpha=_BAND, linewidth=0)
    beyond = np.flatnonzero(values > high)
    if not beyond.size:
        return None
    x = lengths[beyond[0]]
    if beyond[0] > 0:  # where the straight line between two points crosses the edge
        ends = slice(beyond[0] - 1, beyond[0] + 1)
        x = np.exp(np.interp(np.log(high), np.log(values[ends]), np.log(lengths[ends])))
    axes.plot(x, high, "^", markersize=6, color=style["color"], clip_on=False, zorder=4)
    last = entries[-1]["bits_per_byte"]
    return f"{name} not finite" if last is None else f"{name} {last:.3g}"


def _title(axes: "Axes", title: str, cut: Sequence[str], longest: int) -> None:
    """The protocol, and below it the methods that are cut, with their values at the longest."""
    points = 72 * _SIZE[0] * axes.get_position().width
    width = int(points / (_MEAN_WIDTH * _SMALL))
    values = (value.replace(" ", "\xa0", 1) for value in cut)  # a line breaks between methods
    text = textwrap.fill(f"▲ at {longest}: {', '.join(values)}", width) if cut else ""
    axes.set_title(title, pad=6 + (8 * (text.count("\n") + 1) if cut else 0))
    axes.annotate(
        text,
        (0.5, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment="bottom",
        fontsize=_SMALL,
        color="0.3",
    )


def _length_axis(axes: "Axes", lengths: Sequence[int], train_length: int) -> None:
    """Makes x logarithmic in the lengths evaluated, with the training length marked."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    names = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes.set_xticks(lengths, names)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("evaluation length (tokens)")
    axes.axvline(train_length, color="0.3", linestyle=":", linewidth=1, zorder=1)
    place = axes.get_subplotspec()
    if place is not None and place.is_first_col():  # once is enough, and hides less
        axes.annotate(
            "training length",
            (train_length, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            color="0.3",
            fontsize=6.5,
        )
    axes.spines[["top", "right"]].set_visible(False)


def _loss_axis(axes: "Axes", low: float, high: float) -> None:
    """Makes y logarithmic, with ticks at round numbers although it spans less than a decade."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
