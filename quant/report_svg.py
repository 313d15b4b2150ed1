"""Plots as inline SVG without a script: values by layer, and bars in pairs; knows nothing of quantising."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 900  # of every plot, in units of its viewBox

# One shape a style, so that colour is not all that tells series apart; about 9 units wide, around the origin.
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-5.2 4.9 3.6H-4.9z",
    "M0-5.4 5.4 0 0 5.4-5.4 0z", "M0 5.2 4.9-3.6H-4.9z",
    "M-1.4-4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2z",
)  # fmt: skip
STYLES = len(_MARKERS)

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 34, 46
_HEIGHT = 290
_ZERO_BAND = 24  # below a logarithmic axis, for zeros
_LOGARITHMIC_FROM = 5  # largest value by smallest
_MOST_TICKS = 7
_LAYER_GAP = 26  # between the numbers of two layers, at least

_BAR, _ROW, _NAMES, _NOTES = 14, 48, 150, 180  # height of a bar, of a pair; room at the left, at the right


@dataclass(frozen=True, slots=True)
class Series:
    """Values by layer, none negative. style: below STYLES, its marker and colour; points: (layer, value)."""

    name: str
    style: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two bars, one below the other. notes: what is written at their ends."""

    name: str
    values: tuple[float, float]
    notes: tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A vertical axis from the first of its ticks at y = `bottom` up to the last."""

    ticks: tuple[float, ...]
    is_logarithmic: bool
    bottom: float

    def y(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        if not self.is_logarithmic:
            share = (value - first) / (last - first)
        elif value:
            share = math.log(value / first) / math.log(last / first)
        else:
            return self.bottom + _ZERO_BAND
        return self.bottom - share * (self.bottom - _TOP)


def by_layer(label: str, series: Sequence[Series], write: Callable[[float], str]) -> str:
    """Plot series with the layers from left to right; at least one value must be positive.

    label: of the values, with their unit; write: a value for people, where one points at it. The axis is
    logarithmic where values differ much; zeros are then below it.
    """
    layers = [layer for line in series for layer, _ in line.points]
    first, count = min(layers), max(layers) - min(layers) + 1
    axis = _axis([value for line in series for _, value in line.points])
    pitch = (WIDTH - _LEFT - _RIGHT) / count
    floor = _HEIGHT - _BOTTOM

    def x(layer: int) -> float:
        return _LEFT + (layer - first + 0.5) * pitch

    scale = ", logarithmic" if axis.is_logarithmic else ""
    parts = [f'<text class="name" x="0" y="14">{escape(label + scale)}</text>']
    for tick in axis.ticks:
        parts.append(_rule(axis.y(tick), f"{tick:g}"))
    if axis.bottom < floor:
        parts.append(_rule(floor, "0"))
    step = next(step for step in _steps() if step * pitch >= _LAYER_GAP)
    for layer in range(first, first + count):
        if layer % step == 0:
            parts.append(f'<text x="{x(layer):.1f}" y="{floor + 18}" text-anchor="middle">{layer}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">layer</text>')
    for line in series:
        parts.append(f'<g class="s{line.style}"><path class="line" d="{_path(line, axis, x)}"/>')
        for layer, value in line.points:
            title = f"<title>{escape(line.name)}, layer {layer}: {escape(write(value))}</title>"
            place = f"translate({x(layer):.1f} {axis.y(value):.1f})"
            parts.append(f'<path class="point" transform="{place}" d="{_MARKERS[line.style]}">{title}</path>')
        parts.append("</g>")
    return _svg(f"{label}, by layer", _HEIGHT, parts)


def bars(label: str, pairs: Sequence[Pair]) -> str:
    """Draw pairs of bars, which share one scale from zero; the first is of class "before", then "after"."""
    longest = max((value for pair in pairs for value in pair.values), default=0.0) or 1.0
    room = WIDTH - _NAMES - _NOTES
    parts = []
    for number, pair in enumerate(pairs):
        top = number * _ROW + 8
        place = f'x="{_NAMES - 12}" y="{top + _BAR + 5}" text-anchor="end"'
        parts.append(f'<text class="name" {place}>{escape(pair.name)}</text>')
        for value, note, kind in zip(pair.values, pair.notes, ("before", "after"), strict=True):
            width = max(1.0, room * value / longest)
            title = f"<title>{escape(pair.name)}, {kind}: {escape(note)}</title>"
            place = f'x="{_NAMES}" y="{top}" width="{width:.1f}" height="{_BAR}"'
            parts.append(
                f'<rect class="{kind}" {place} rx="2">{title}</rect>'
                f'<text x="{_NAMES + width + 8:.1f}" y="{top + 11}">{escape(note)}</text>'
            )
            top += _BAR + 2
    return _svg(label, len(pairs) * _ROW + 4, parts)


def marker(style: int) -> str:
    """Draw one marker as it is in plots, for a legend."""
    path = f'<path class="point" d="{_MARKERS[style]}"/>'
    return f'<svg class="key s{style}" viewBox="-7 -7 14 14" aria-hidden="true">{path}</svg>'


def _axis(values: Sequence[float]) -> _Axis:
    """Choose round ticks that enclose all values, zeros apart where the axis is logarithmic."""
    low, high = min(value for value in values if value), max(values)
    floor = float(_HEIGHT - _BOTTOM)
    if high >= _LOGARITHMIC_FROM * low:
        return _Axis(_logarithmic(low, high), True, floor if min(values) else floor - _ZERO_BAND)
    # From zero if that is near; a series of almost equal values must not look like a mountain range.
    low = min(values) if min(values) > 0.4 * high else 0.0
    spread = max(high - low, 0.2 * high)
    low = max(0.0, (low + high - spread) / 2)
    unit = 10.0 ** math.floor(math.log10(spread / 3.5))
    step = unit * max(m for m in (1, 2, 5) if m * unit <= spread / 3.5)
    start, stop = math.floor(low / step), math.ceil(max(high, low + spread) / step)
    return _Axis(tuple(step * n for n in range(start, stop + 1)), False, floor)


def _logarithmic(low: float, high: float) -> tuple[float, ...]:
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [m * 10.0**e for e in range(bottom, top + 1) for m in (1, 2, 5)]
    start = max(n for n, tick in enumerate(fine) if tick <= low)
    stop = min(n for n, tick in enumerate(fine) if tick >= high)
    if stop - start < _MOST_TICKS:
        return tuple(fine[start : stop + 1])
    step = math.ceil((top - bottom) / (_MOST_TICKS - 1))
    return tuple(10.0**e for e in range(bottom, top + step, step))


def _path(line: Series, axis: _Axis, x: Callable[[int], float]) -> str:
    """Join the points of neighbouring layers, but none that is off the scale."""
    commands, before = [], None
    for layer, value in line.points:
        if not value and axis.is_logarithmic:
            continue
        commands.append(f"{'L' if before == layer - 1 else 'M'}{x(layer):.1f} {axis.y(value):.1f}")
        before = layer
    return "".join(commands)


def _steps() -> Sequence[int]:
    return [m * 10**e for e in range(6) for m in (1, 2, 5)]


def _rule(y: float, label: str) -> str:
    return (
        f'<path class="rule" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _svg(label: str, height: int, parts: Sequence[str]) -> str:
    attributes = f'viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{escape(label)}"'
    return "\n".join((f'<svg class="plot" {attributes}>', *parts, "</svg>"))
