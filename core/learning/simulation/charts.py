"""Charts as plain SVG text: lines, stacked bars, and a grid of who did what when.

Sizes are in units of the view box, which is narrow, so that the text stays readable when a
telephone scales a chart down. Colours are classes of the page's style sheet.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34
_BAR, _GAP, _NAMES = 17, 9, 58
_GAP_FROM = 4  # narrower cells touch
_FLAT = 1e-6
_MIN_CHARS_AFTER = 56  # room for the figure behind a bar


@dataclass(frozen=True)
class Line:
    """A named line, one value a round; `low` and `high` make a band around it."""

    name: str
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_chart(lines: Mapping[str, Line], unit: str, label: str) -> str:
    """Lines over rounds 0, 1, ...; keys are style classes, the last is drawn on top."""
    values = [v for line in lines.values() for v in (*line.values, *line.low, *line.high)]
    ticks = _ticks(min(values), max(values))
    rounds = max(len(line.values) for line in lines.values()) - 1

    def x(number: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * number / max(1, rounds)

    def y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    parts = []
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{_LEFT} {y(tick):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick:g}{unit}", "end"))
    for tick in _ticks(0, rounds):
        if tick <= rounds and tick == int(tick):
            parts.append(_text(x(tick), HEIGHT - _BOTTOM + 16, f"{tick:g}", "middle"))
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 3, "round", "middle"))
    for kind, line in lines.items():
        if line.low:
            there = [f"{x(i):.1f} {y(v):.1f}" for i, v in enumerate(line.high)]
            back = [f"{x(i):.1f} {y(v):.1f}" for i, v in enumerate(line.low)]
            outline = "L".join(there + back[::-1])
            parts.append(f'<path class="band {kind}" d="M{outline}Z"/>')
        points = "L".join(f"{x(i):.1f} {y(v):.1f}" for i, v in enumerate(line.values))
        last = f"{line.name}: {line.values[-1]:.4g}{unit} in the end"
        title = f"<title>{escape(last)}</title>"
        parts.append(f'<path class="line {kind}" d="M{points}">{title}</path>')
    return _svg(HEIGHT, parts, label)


def bar_chart(
    bars: Mapping[str, Mapping[str, float]],
    classes: Mapping[str, str],
    figures: Mapping[str, str],
    label: str,
) -> str:
    """A horizontal bar a party, stacked of named parts; `figures` stand behind the bars."""
    longest = max((sum(parts.values()) for parts in bars.values()), default=0) or 1
    room = WIDTH - _NAMES - _MIN_CHARS_AFTER
    out = []
    for row, (name, parts) in enumerate(bars.items()):
        top, start = row * (_BAR + _GAP), float(_NAMES)
        out.append(_text(_NAMES - 6, top + 13, _short(name), "end"))
        for part, value in parts.items():
            width = room * value / longest
            out.append(
                f'<rect class="{classes[part]}" x="{start:.1f}" y="{top}" '
                f'width="{width:.2f}" height="{_BAR}"><title>{escape(f"{name}: {part}")}'
                "</title></rect>"
            )
            start += width
        out.append(_text(start + 5, top + 13, figures[name]))
    return _svg(len(bars) * (_BAR + _GAP), out, label)


def grid_chart(rows: Mapping[str, Sequence[str]], titles: Mapping[str, str], label: str) -> str:
    """A row a participant, a cell a round; cells are style classes, `titles` explains them."""
    columns = max(len(cells) for cells in rows.values())
    width = (WIDTH - _NAMES - 4) / columns
    side = min(width, float(_BAR + 5))
    out = []
    for row, (name, cells) in enumerate(rows.items()):
        top = row * (_BAR + 5)
        out.append(_text(_NAMES - 6, top + 13, _short(name), "end"))
        for column, cell in enumerate(cells):
            title = f"{name}, round {column + 1}: {titles[cell]}"
            gap = 1 if side >= _GAP_FROM else 0
            out.append(
                f'<rect class="cell {cell}" x="{_NAMES + column * side:.2f}" y="{top}" '
                f'width="{side - gap:.2f}" height="{_BAR}">'
                f"<title>{escape(title)}</title></rect>"
            )
    bottom = len(rows) * (_BAR + 5) + 12
    for tick in _ticks(0, columns):
        if 0 < tick <= columns and tick == int(tick):
            out.append(_text(_NAMES + (tick - 0.5) * side, bottom, f"{tick:g}", "middle"))
    return _svg(bottom + 4, out, label)


def legend(entries: Mapping[str, str]) -> str:
    """Names beside their colours: style class to name."""
    items = (
        f'<li><svg viewBox="0 0 24 10" aria-hidden="true"><path class="key {kind}" d="M0 5H24"/>'
        f"</svg>{escape(name)}</li>"
        for kind, name in entries.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 9 else f"{name[:8]}…"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers, from below `low` to above `high`."""
    span = high - low
    if span < _FLAT * max(1.0, abs(high)):  # ticks would differ by less than a float can tell
        span = max(abs(high), _FLAT)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]
