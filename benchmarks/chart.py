"""Charts for result files, as SVG that stands alone."""

import dataclasses
from collections.abc import Mapping, Sequence

from longrl_jax.report.svg import Axis

COLOURS = ("#767676", "#b35900", "#7b3fa0", "#0b6e4f", "#1f5fbf")
WIDTH, HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 380, 280, 34, 28, 30, 20
LEGEND_WIDTH = 148
NAME_WIDTH, ROW_HEIGHT = 90, 42


def draw(what: str, panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """Draws panels beside each other: {title: {name of a line: {x: y}}}, the same names in all.

    x is logarithmic, y starts at 0; what: the meaning of y.
    """
    parts = []
    for i, (title, lines) in enumerate(panels.items()):
        parts += _panel(lines, i * WIDTH, f"{what}: {title}")
    for i, name in enumerate(lines):
        x, y = LEFT + i * LEGEND_WIDTH, HEIGHT + 8
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="4" fill="{COLOURS[i]}"/>')
        parts.append(_text(x + 17, y + 6, name, "start"))
    return _page(parts, len(panels) * WIDTH, HEIGHT + 24)


@dataclasses.dataclass(frozen=True)
class Dot:
    """A mean with its interval, what it is the mean of, and a number to compare it with."""

    mean: float
    low: float
    high: float
    others: Sequence[float]
    reference: float


def dots(what: str, rows: Mapping[str, Dot], *, reference: str) -> str:
    """Draws a row for every name, x from 0 to 100; reference: what the rings are."""
    foot = TOP + ROW_HEIGHT * len(rows)
    place = Axis(0, 100, NAME_WIDTH, 2 * WIDTH - RIGHT)
    parts = [_text(NAME_WIDTH, 18, what, "start")]
    for tick in place.ticks(10):
        parts.append(f'<path d="M{place(tick):.1f} {TOP}V{foot}" stroke="#ddd"/>')
        parts.append(_text(place(tick), foot + 16, f"{tick:g}", "middle"))
    for i, (name, dot) in enumerate(rows.items()):
        y, colour = TOP + ROW_HEIGHT * (i + 0.5), COLOURS[-1]
        parts.append(_text(NAME_WIDTH - 12, y + 4, name, "end"))
        ends = f"M{place(dot.low):.1f} {y}H{place(dot.high):.1f}"
        parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2"/>')
        parts.append(_circle(place(dot.mean), y, 5, f'fill="{colour}"'))
        parts += [_circle(place(x), y + 9, 2.5, f'fill="{colour}"') for x in dot.others]
        ring = f'fill="white" stroke="{COLOURS[1]}" stroke-width="2"'
        parts.append(_circle(place(dot.reference), y - 9, 4, ring))
    legend = f"large: mean and 95 % interval; small: every seed; ring: {reference}"
    parts.append(_text(NAME_WIDTH, foot + 36, legend, "start"))
    return _page(parts, 2 * WIDTH, foot + 46)


def _page(parts: Sequence[str], width: float, height: float) -> str:
    size = f'viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="11"'
    white = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{white}{"".join(parts)}</svg>\n'


def _panel(lines: Mapping[str, Mapping[int, float]], left: int, title: str) -> list[str]:
    start, end, foot = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM
    xs = sorted({x for line in lines.values() for x in line})
    place_x = Axis(xs[0], xs[-1], start, end, log=True)
    place_y = Axis(0, max(max(line.values()) for line in lines.values()), foot, TOP)
    parts = [_text(start, 18, title, "start")]
    for tick in place_y.ticks(8):
        parts.append(f'<path d="M{start} {place_y(tick):.1f}H{end}" stroke="#ddd"/>')
        parts.append(_text(start - 6, place_y(tick) + 4, f"{tick:g}", "end"))
    parts += [_text(place_x(x), foot + 16, f"{x:,}", "middle") for x in xs]
    for line, colour in zip(lines.values(), COLOURS, strict=False):
        points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line.items())
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    return parts


def _text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _circle(x: float, y: float, radius: float, look: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {look}/>'
