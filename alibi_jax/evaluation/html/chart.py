"""Line charts as inline SVG, in the colours of the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from alibi_jax.evaluation.html.tags import Html, tag

_WIDTH, _HEIGHT = 440, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 44
_LABEL_WIDTH = 38  # least distance of two labels on the x axis
_DASHES = (None, "7 3", "2 3", "9 3 2 3")
_MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
)
NUM_COLORS = 8  # of the style sheet: .c0 and so on


class Line(NamedTuple):
    """One curve: points from left to right; None leaves a gap."""

    label: str
    points: Sequence[tuple[float, float | None]]
    bounds: Sequence[Sequence[float] | None] = ()  # of each point, or none at all
    style: int = 0  # which colour, marker and dashes
    markers: bool = True


class Axis(NamedTuple):
    """What an axis says, and its scale: "linear", "log" or "symlog" (linear within ±1)."""

    label: str
    scale: str = "linear"
    format: Callable[[float], str] = "{:g}".format
    limits: tuple[float, float] | None = None  # None: those of the data


class Guides(NamedTuple):
    """What stands behind the curves."""

    vertical: tuple[float, str] | None = None  # a line at x, and its name
    horizontal: Sequence[tuple[float, str]] = ()  # lines at y, and their names
    band: float | None = None  # the range ±band of y


_NONE = Guides()


def chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str, guides: Guides = _NONE) -> Html:
    """Draw curves, with a description for those who cannot see them.

    Args:
        lines: At least one with a point that is not None.
        x: Ticks are at the points' own x on a log scale.
        y: The vertical axis.
        title: What the chart shows; becomes its caption.
        guides: Lines and bands to compare with.
    """
    to_x, x_ticks = _x_axis(lines, x)
    to_y, y_ticks = _y_axis(lines, y, guides)
    parts = []
    if guides.band is not None:
        top, bottom = to_y(guides.band), to_y(-guides.band)
        parts.append(_rect(_LEFT, top, _WIDTH - _RIGHT - _LEFT, bottom - top, "band"))
    for value, label in y_ticks:
        parts.append(_segment(_LEFT, to_y(value), _WIDTH - _RIGHT, to_y(value), "grid"))
        parts.append(_label(label, _LEFT - 6, to_y(value) + 4, "end"))
    base = _HEIGHT - _BOTTOM
    parts.append(_segment(_LEFT, base, _WIDTH - _RIGHT, base, "axis"))
    for value, label in x_ticks:
        parts.append(_segment(to_x(value), base, to_x(value), base + 4, "axis"))
        if label:
            parts.append(_label(label, to_x(value), base + 17, "middle"))
    parts += _guides(guides, to_x, to_y)
    for line in lines:
        parts += _curve(line, to_x, to_y)
    parts.append(_label(x.label, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "middle"))
    turned = f"rotate(-90 12 {(_TOP + base) / 2:g})"
    parts.append(_label(y.label, 12, (_TOP + base) / 2, "middle", transform=turned))
    drawing = tag(
        "svg",
        tag("title", title),
        tag("desc", _describe(lines, x, y)),
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title}. {_describe(lines, x, y)}",
    )
    return tag("figure", drawing, tag("figcaption", title))


def legend(lines: Sequence[Line]) -> Html:
    """Name the curves of one or more charts, each style once."""
    first = {line.style: line for line in reversed(lines)}
    items = []
    for style in dict.fromkeys(line.style for line in lines):
        sample = first[style]._replace(points=[(0, 0), (28, 0)], bounds=(), markers=False)
        curve = [*_curve(sample, lambda v: v + 1, lambda v: v + 6)]
        if first[style].markers:
            curve.append(_marker(style, 15, 6))
        swatch = tag("svg", *curve, viewBox="0 0 30 12", class_="swatch", aria_hidden="true")
        items.append(tag("li", swatch, " ", first[style].label))
    return tag("ul", *items, class_="legend")


def _x_axis(
    lines: Sequence[Line], axis: Axis
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    values = sorted({x for line in lines for x, _ in line.points})
    transform = math.log2 if axis.scale == "log" else float
    low, high = transform(values[0]), transform(values[-1])
    if low == high:
        low, high = low - 1, high + 1
    inner = 10  # so that markers and labels at the ends have room
    span = _WIDTH - _RIGHT - _LEFT - 2 * inner

    def place(value: float) -> float:
        return _LEFT + inner + span * (transform(value) - low) / (high - low)

    ticks = values if axis.scale == "log" else _nice(values[0], values[-1])
    labelled: list[tuple[float, str]] = []
    last = -math.inf
    for value in ticks:
        fits = place(value) - last >= _LABEL_WIDTH
        labelled.append((value, axis.format(value) if fits else ""))
        last = place(value) if fits else last
    return place, labelled


def _y_axis(
    lines: Sequence[Line], axis: Axis, guides: Guides
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    low, high = axis.limits or limits(lines)
    if guides.band is not None:
        low, high = min(low, -2 * guides.band), max(high, 2 * guides.band)
    if guides.horizontal:  # the lowest is always seen, others where there is room
        lowest = min(guides.horizontal)[0]
        low, high = min(low, lowest), max(high, lowest)
    transform = _symlog if axis.scale == "symlog" else float
    ticks = _powers(low, high) if axis.scale == "symlog" else _nice(low, high)
    bottom, top = transform(low), transform(high)
    margin = 0.06 * ((top - bottom) or 1.0)
    bottom, top = bottom - margin, top + margin
    height = _HEIGHT - _TOP - _BOTTOM

    def place(value: float) -> float:
        return _TOP + height * (top - transform(value)) / (top - bottom)

    return place, [(value, axis.format(value)) for value in ticks]


def limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and the highest of points, and of bounds that are not far from these."""
    values = [y for line in lines for _, y in line.points if y is not None]
    low, high = min(values), max(values)
    room = max(high - low, 0.02 * max(abs(low), abs(high)))
    values += [value for line in lines for pair in line.bounds if pair for value in pair]
    return max(min(values), low - room), min(max(values), high + room)


def _symlog(value: float) -> float:
    return math.copysign(math.log10(1 + abs(value)), value)


def _powers(low: float, high: float) -> list[float]:
    """0, and powers of ten on both sides; steps of one half where there is no room for these."""
    if max(-low, high) < 5:
        return _nice(low, high)
    powers = [10.0**i for i in range(10)]
    return [-p for p in reversed(powers) if -p >= low] + [0.0] + [p for p in powers if p <= high]


def _nice(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    raw = (high - low) / 5 or abs(low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _curve(
    line: Line, to_x: Callable[[float], float], to_y: Callable[[float], float]
) -> list[Html]:
    color = f"c{line.style % NUM_COLORS}"
    parts = []
    bounds = line.bounds or [None] * len(line.points)
    stretches: list[list[tuple[float, float, Sequence[float] | None]]] = [[]]
    for (x, y), pair in zip(line.points, bounds, strict=True):
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((x, y, pair))
    for stretch in filter(None, stretches):
        sides = [(x, pair) for x, _, pair in stretch if pair is not None]
        if len(sides) > 1:
            outline = [(x, pair[1]) for x, pair in sides]
            outline += [(x, pair[0]) for x, pair in sides[::-1]]
            points = _points(outline, to_x, lambda y: _inside(to_y(y)))
            parts.append(tag("polygon", points=points, class_=f"interval {color}"))
        parts.append(
            tag(
                "polyline",
                points=_points([(x, y) for x, y, _ in stretch], to_x, to_y),
                class_=f"line {color}",
                stroke_dasharray=_DASHES[(line.style + line.style // NUM_COLORS) % len(_DASHES)],
            )
        )
        if line.markers:
            parts += [_marker(line.style, to_x(x), to_y(y)) for x, y, _ in stretch]
    return parts


def _inside(y: float) -> float:
    return min(max(y, _TOP), _HEIGHT - _BOTTOM)


def _points(
    points: Sequence[tuple[float, float]],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> str:
    return " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)


def _marker(style: int, x: float, y: float) -> Html:
    return tag(
        "path",
        d=_MARKERS[style % len(_MARKERS)],
        transform=f"translate({x:.1f} {y:.1f})",
        class_=f"marker c{style % NUM_COLORS}",
    )


def _guides(
    guides: Guides, to_x: Callable[[float], float], to_y: Callable[[float], float]
) -> list[Html]:
    parts = []
    if guides.vertical is not None:
        value, name = guides.vertical
        parts.append(_segment(to_x(value), _TOP, to_x(value), _HEIGHT - _BOTTOM, "guide"))
        side = "start" if to_x(value) < _WIDTH / 2 else "end"
        parts.append(_label(name, to_x(value) + (4 if side == "start" else -4), _TOP + 8, side))
    for value, name in guides.horizontal:
        if not _TOP <= to_y(value) <= _HEIGHT - _BOTTOM:
            continue
        parts.append(_segment(_LEFT, to_y(value), _WIDTH - _RIGHT, to_y(value), "guide"))
        parts.append(_label(name, _WIDTH - _RIGHT, to_y(value) + 13, "end"))
    return parts


def _describe(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """The ends of every curve in words."""

    def ends(line: Line) -> str:
        known = [(a, b) for a, b in line.points if b is not None]
        if not known:
            return f"{line.label}: no number"
        (x0, y0), (x1, y1) = known[0], known[-1]
        return f"{line.label}: {y0:.4g} at {x.format(x0)} to {y1:.4g} at {x.format(x1)}"

    return f"{y.label} against {x.label}. " + "; ".join(map(ends, lines)) + "."


def _segment(x0: float, y0: float, x1: float, y1: float, kind: str) -> Html:
    return tag("line", x1=f"{x0:.1f}", y1=f"{y0:.1f}", x2=f"{x1:.1f}", y2=f"{y1:.1f}", class_=kind)


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Html:
    return tag(
        "rect",
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        width=f"{width:.1f}",
        height=f"{height:.1f}",
        class_=kind,
    )


def _label(text: str, x: float, y: float, anchor: str, transform: str | None = None) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, transform=transform)
