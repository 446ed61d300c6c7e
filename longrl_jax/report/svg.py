"""Charts as inline SVG: lines over steps, dots with intervals, stacked bars.

All are drawn in a box WIDTH wide, which is about one column on a phone and on a desktop: text of 11
units is then 11 to 13 pixels everywhere. Colours are classes of page.css (dark mode changes them).
"""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 34
NUM_COLOURS = 8
MAX_POINTS = 400
"""Points of one or two lines; longer ones, and four lines, are averaged over runs of steps."""
MAX_BARS = 48
MAX_NAME = 24
"""Characters of a row's name that are shown."""
MANY_DOTS = 12
"""More dots than this are drawn smaller."""
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #5b6675; }
text.title { font-weight: 600; fill: #1c2430; }
.grid { stroke: #dfe3e8; } .axis { stroke: #c3cad3; }
.rule { stroke: #5b6675; stroke-dasharray: 4 4; }
path { fill: none; stroke: var(--own); stroke-width: 2.2; stroke-linejoin: round; }
.bar { stroke: var(--own); stroke-width: 2; opacity: .6; } .dot { fill: var(--own); stroke: #fff; }
.c0 { --own: #2563c9; } .c1 { --own: #d9730d; } .c2 { --own: #16906b; } .c3 { --own: #b83280; }
.c4 { --own: #7a4fd0; } .c5 { --own: #8a6d1d; } .c6 { --own: #0e8aa5; } .c7 { --own: #c4453c; }
"""
"""Of a chart that stands alone: page.css in its light colours."""
LOG_RANGE = 30.0
"""A chart that may be logarithmic is, if its values span more than this factor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """A measured value with its interval (equal to the value where it is not known)."""

    step: float
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    colour: int
    """Its class is c<colour modulo NUM_COLOURS>."""
    steps: np.ndarray
    values: np.ndarray
    """nan where there is none; a gap in the line."""
    dots: tuple[Dot, ...] = ()


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where values lie in the box: a linear or logarithmic scale between two ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        share = (v - a) / (b - a) if b > a else 0.5  # a single value stands in the middle
        return self.start + (self.end - self.start) * share

    def ticks(self, count: int) -> list[float]:
        """Returns about `count` round values between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, math.ceil((last - first + 1) / count))
            return [10.0**k for k in range(first, last + 1, every)]
        rough = (self.high - self.low) / count
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def line_chart(
    series: Sequence[Series], *, label: str, percent: bool = False, may_be_log: bool = False
) -> Markup:
    """Draws a smoothed line over faint raw points, and dots with bars, for every series.

    percent: values are shares and shown as such, on an axis that starts at 0. The hover values of
    page.js are in the attribute data-chart.
    """
    most = MAX_POINTS // max(1, len(series) // 2)
    series = [_thinned(one, most) for one in series]
    steps = np.concatenate([[d.step for d in s.dots] + s.steps.tolist() for s in series])
    first, last = float(steps.min()), float(steps.max())
    x = Axis(first, max(last, first + 1), LEFT, WIDTH - RIGHT)
    y = _value_axis(series, percent=percent, may_be_log=may_be_log)
    parts = [_grid(x, y, percent=percent)]
    for one in series:
        smooth = trailing_mean(one.values, window(len(one.values)))
        if len(series) <= 4:
            parts.append(_path(one.steps, one.values, x, y, f"raw c{one.colour % NUM_COLOURS}"))
        parts.append(_path(one.steps, smooth, x, y, f"line c{one.colour % NUM_COLOURS}"))
    for one in series:
        radius = 4.0 if len(one.dots) <= MANY_DOTS else 2.2
        parts.extend(_dot(dot, x, y, one.colour, radius) for dot in one.dots)
    data = {
        "x": [x.low, x.high, LEFT, WIDTH - RIGHT],
        "percent": percent,
        "series": [_hover(one) for one in series],
    }
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-chart="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, label, json.dumps(data, allow_nan=False), Markup("").join(parts))


def interval_chart(
    rows: Sequence[tuple[str, Sequence[tuple[int, float, float, float]]]],
    *,
    label: str,
    most: float,
) -> Markup:
    """Draws for every named row its (colour, mean, low, high) as dots with bars, one below another.

    Values are shares; the axis goes from 0 to `most`.
    """
    gap, line = 12, 13
    longest = max((len(name) for name, _ in rows), default=0)
    left = LEFT + 40 + 6 * max(0, min(longest, MAX_NAME) - 13)
    height = TOP + sum(line * len(dots) + gap for _, dots in rows) + BOTTOM
    x = Axis(0.0, most, left, WIDTH - RIGHT - 8)  # room for half of the label 100%
    parts: list[Markup] = []
    for tick in x.ticks(5):
        parts.append(_line(x(tick), TOP, x(tick), height - BOTTOM, "grid"))
        parts.append(_label(x(tick), height - BOTTOM + 15, f"{100 * tick:.0f}%", "middle"))
    top = TOP + gap / 2
    for name, dots in rows:
        middle = top + line * len(dots) / 2 + 4
        parts.append(_label(left - 8, middle, name[:MAX_NAME], "end"))
        for place, (colour, mean, low, high) in enumerate(dots):
            at, colour_class = top + line * (place + 0.5), f"c{colour % NUM_COLOURS}"
            parts.append(_line(x(max(low, 0)), at, x(min(high, most)), at, f"bar {colour_class}"))
            parts.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="dot {}"/>').format(
                    x(mean), at, colour_class
                )
            )
        top += line * len(dots) + gap
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )


def dots_chart(
    series: Sequence[Series], *, label: str, x_label: str, rules: Sequence[float] = ()
) -> Markup:
    """Draws the dots of every series with their bars, joined by a line, over a logarithmic axis
    whose ticks are the dots' own places; they must be above 0.

    Values are shares, on an axis from 0. rules: what is the same at every place, as broken lines.
    Series that share a place stand beside one another there.
    """
    places = sorted({dot.step for one in series for dot in one.dots})
    most = max([dot.high for one in series for dot in one.dots] + list(rules))
    x = Axis(places[0], places[-1], LEFT + 16, WIDTH - RIGHT - 16, log=True)
    y = Axis(0.0, min(1.0, 1.08 * most) or 1.0, HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in y.ticks(5):
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(_label(LEFT - 6, y(tick) + 4, short(tick, percent=True), "end"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    parts += [_label(x(place), HEIGHT - BOTTOM + 15, f"{place:g}", "middle") for place in places]
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"))
    parts += [_line(LEFT, y(value), WIDTH - RIGHT, y(value), "rule") for value in rules]
    for number, one in enumerate(series):
        aside = 7.0 * (number - (len(series) - 1) / 2)  # so that no bar hides another
        points = [(x(dot.step) + aside, dot) for dot in sorted(one.dots, key=lambda dot: dot.step)]
        words = [
            f"{'L' if i else 'M'}{at:.1f} {y(dot.value):.1f}" for i, (at, dot) in enumerate(points)
        ]
        colour = f"c{one.colour % NUM_COLOURS}"
        parts.append(Markup('<path d="{}" class="line {}"/>').format("".join(words), colour))
        for at, dot in points:
            parts.append(_line(at, y(dot.low), at, y(min(dot.high, y.high)), f"bar {colour}"))
            circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="dot {}"/>')
            parts.append(circle.format(at, y(dot.value), colour))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def alone(chart: Markup, legend: Sequence[tuple[int, str]], title: str, note: str) -> str:
    """Returns a chart as a file of its own: with its colours, a title, a legend and a note, whose
    parts between semicolons are lines."""
    notes = note.split("; ")
    head, line = 26, 16
    top = head + line * (len(legend) + len(notes))
    height = int(chart.partition('viewBox="0 0 ')[2].partition('"')[0].split()[1]) + top
    words = [_label(LEFT, 16, title, "start", "title")]
    for place, (colour, name) in enumerate(legend):
        at = head + line * (place + 0.5)
        key = Markup('<circle cx="{}" cy="{:.1f}" r="4" class="dot c{}"/>')
        words += [
            key.format(LEFT + 4, at, colour % NUM_COLOURS),
            _label(LEFT + 14, at + 4, name, "start"),
        ]
    for place, text in enumerate(notes, start=len(legend)):
        words.append(_label(LEFT, head + line * (place + 0.5) + 4, text, "start"))
    form = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}">\n'
        '<style>{}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{}\n'
        '<g transform="translate(0 {})">{}</g>\n</svg>\n'
    )
    return Markup(form).format(
        WIDTH, height, 2 * WIDTH, 2 * height, Markup(STYLE), Markup("").join(words), top,
        Markup(chart[chart.index(">") + 1 : -len("</svg>")]),
    )  # fmt: skip


def stacked_bars(
    steps: np.ndarray, seconds: Float[np.ndarray, "N K"], *, label: str, last_first: int
) -> Markup:
    """Draws bars of K stacked parts over steps; neighbouring steps are averaged into one bar.

    seconds: column k has colour k, the column last_first the faint one. The axis ends where 95 % of
    the bars do or at twice their median: one step that compiles must not flatten the others.
    """
    every = math.ceil(len(steps) / MAX_BARS)
    cuts = range(0, len(steps), every)
    bars = [
        (steps[i], steps[min(i + every, len(steps)) - 1], seconds[i : i + every].mean(axis=0))
        for i in cuts
    ]
    totals = np.array([parts.sum() for _, _, parts in bars])
    most = min(totals.max(), max(2.0 * float(np.median(totals)), float(np.quantile(totals, 0.95))))
    y = Axis(0.0, max(most, 1e-9), HEIGHT - BOTTOM, TOP)
    x = Axis(float(steps[0]) - 0.5, float(steps[-1]) + 0.5, LEFT, WIDTH - RIGHT)
    drawn = [_grid(x, y, percent=False)]
    for first, last, parts in bars:
        left, right = x(first - 0.5), x(last + 0.5)
        base = 0.0
        for k, part in enumerate(parts):
            top = min(base + part, most)
            if top > base:
                colour = "faint" if k == last_first else f"c{k % NUM_COLOURS}"
                end = max(right - 0.5, left + 1)
                drawn.append(_bar(left + 0.5, y(top), end, y(base), f"fill {colour}"))
            base += part
        if base > most * 1.001:
            drawn.append(_label((left + right) / 2, TOP - 2, f"{base:.0f}", "middle", "over"))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(drawn)
    )


def histogram(counts_NK: Int[np.ndarray, "N K"], *, label: str, x_name: str) -> Markup:
    """Draws a bar over every number 0 to N-1, of K stacked parts, the last one faint, with its
    height over it."""
    totals = counts_NK.sum(axis=1)
    x = Axis(-0.5, len(totals) - 0.5, LEFT, WIDTH - RIGHT)
    y = Axis(0.0, 1.08 * max(int(totals.max()), 1), HEIGHT - BOTTOM, TOP)
    drawn = [_grid(x, y, percent=False, x_name=x_name)]
    for i, parts in enumerate(counts_NK):
        left, right, base = x(i - 0.4), x(i + 0.4), 0
        for k, part in enumerate(parts.tolist()):
            colour = "faint" if k == counts_NK.shape[1] - 1 else f"c{k % NUM_COLOURS}"
            if part:
                drawn.append(_bar(left, y(base + part), right, y(base), f"fill {colour}"))
            base += part
        if base:
            drawn.append(_label((left + right) / 2, y(base) - 3, str(base), "middle", "over"))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(drawn)
    )


def window(num_points: int) -> int:
    """Returns how many points a smoothed line averages."""
    return max(1, min(num_points, MAX_POINTS) // 12)


def trailing_mean(values: np.ndarray, size: int) -> np.ndarray:
    """Returns the mean of up to `size` values that end at each place; nan is passed over."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - size, 0)
    count = counts[ends] - counts[starts]
    mean = (sums[ends] - sums[starts]) / np.maximum(count, 1)
    return np.where(known & (count > 0), mean, np.nan)


def short(value: float, *, percent: bool = False) -> str:
    """Returns a number as an axis or a card shows it."""
    if percent:
        return f"{100 * value:.3g}%"
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.4g}"


def _thinned(series: Series, most: int) -> Series:
    """Averages runs of steps, so that a page of a long run stays small."""
    every = math.ceil(len(series.steps) / most)
    if every <= 1:
        return series
    starts = range(0, len(series.steps), every)
    means = []
    for i in starts:
        part = series.values[i : i + every]
        known = part[np.isfinite(part)]
        means.append(known.mean() if len(known) else np.nan)
    last = [series.steps[min(i + every, len(series.steps)) - 1] for i in starts]
    return dataclasses.replace(series, steps=np.array(last), values=np.array(means))


def _value_axis(series: Sequence[Series], *, percent: bool, may_be_log: bool) -> Axis:
    lines = [s.values[np.isfinite(s.values)] for s in series]
    ends = [v for s in series for d in s.dots for v in (d.low, d.high) if math.isfinite(v)]
    values = np.concatenate([*lines, ends])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    bottom, top = HEIGHT - BOTTOM, TOP
    positive = values[values > 0]
    if may_be_log and low >= 0 and len(positive) and high / positive.min() > LOG_RANGE:
        least = 10 ** math.floor(math.log10(positive.min()))
        return Axis(least, max(10 ** math.ceil(math.log10(high)), 10 * least), bottom, top, True)
    if percent:
        return Axis(0.0, 1.0 if high > 0.5 else max(0.1, 1.1 * high), bottom, top)
    if high == low:
        low, high = low - max(abs(low), 1e-3) * 0.5, high + max(abs(high), 1e-3) * 0.5
    margin = 0.06 * (high - low)
    return Axis(0.0 if 0 <= low < 0.3 * high else low - margin, high + margin, bottom, top)


def _grid(x: Axis, y: Axis, *, percent: bool, x_name: str = "step") -> Markup:
    parts = []
    for tick in y.ticks(5):
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(_label(LEFT - 6, y(tick) + 4, short(tick, percent=percent), "end"))
    whole = [tick for tick in x.ticks(6) if tick == round(tick)]
    parts.extend(_label(x(tick), HEIGHT - BOTTOM + 15, f"{tick:.0f}", "middle") for tick in whole)
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name, "middle"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    return Markup("").join(parts)


def _path(steps: np.ndarray, values: np.ndarray, x: Axis, y: Axis, kind: str) -> Markup:
    """Draws a line that breaks where a value is missing, or has no place on a log scale."""
    words, pen_up = [], True
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value) or (y.log and value < y.low):
            pen_up = True
            continue
        words.append(f"{'M' if pen_up else 'L'}{x(step):.1f} {y(value):.1f}")
        pen_up = False
    if len(words) == 1:  # a lone point: a line of no length with round ends is a point
        words.append("l0 0")
    return Markup('<path d="{}" class="{}"/>').format("".join(words), kind)


def _dot(dot: Dot, x: Axis, y: Axis, colour: int, radius: float) -> Markup:
    if not math.isfinite(dot.value):
        return Markup("")
    colour_class = f"c{colour % NUM_COLOURS}"
    bar = Markup("")
    if dot.high > dot.low:
        bar = _line(x(dot.step), y(dot.low), x(dot.step), y(dot.high), f"bar {colour_class}")
    circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="dot {}"/>')
    return bar + circle.format(x(dot.step), y(dot.value), radius, colour_class)


def _hover(series: Series) -> dict[str, object]:
    def plain(value: float) -> float | None:
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return {
        "name": series.name,
        "colour": series.colour % NUM_COLOURS,
        "steps": [int(step) for step in series.steps],
        "values": [plain(value) for value in series.values],
        "dots": [[int(d.step), plain(d.value), plain(d.low), plain(d.high)] for d in series.dots],
    }


def _bar(left: float, top: float, right: float, bottom: float, kind: str) -> Markup:
    form = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}"/>'
    return Markup(form).format(left, top, right - left, bottom - top, kind)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    form = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>'
    return Markup(form).format(x1, y1, x2, y2, kind)


def _label(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    form = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>'
    return Markup(form).format(x, y, anchor, kind, text)
