"""Tables of scores: validation during training, and what python -m longrl_jax.evaluate found."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from longrl_jax import scores
from longrl_jax.report import folders, svg

MODES = {
    "greedy": "Greedy",
    "sampled": "Sampled",
    "shuffled": "Options shuffled",
    "no_video": "Blind: no video",
    "other_video": "Blind: other video",
}
"""Mode of scores.json -> its heading; modes that are not here keep their own name."""
BASELINES = {"one_letter": "Best one letter", "chance": "Chance"}
"""Baseline of scores.json -> its heading; they are about accuracies."""
ENDS = ("low", "high", "n")
PARTS = ("accuracy", "format", "total")
"""Last words of reward parts, the most telling first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A number in words."""

    text: str
    note: str = ""
    """Smaller, below: an interval, a count."""
    mood: str = ""
    """up, down or nothing: a class of page.css."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under headings; the first heading is over the names of the rows."""

    title: str
    note: str = ""
    headings: list[str]
    rows: list[tuple[str, list[Cell]]]
    """A name that starts with a space is drawn indented: a kind below its whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepChart:
    """One sweep.json, drawn."""

    title: str
    note: str
    svg: Markup
    legend: list[tuple[int, str]]
    """(colour, line)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One scores.json."""

    title: str
    note: str
    chart: Markup
    legend: list[tuple[int, str]]
    """(colour, mode)."""
    overview: Table | None
    """All parts side by side, where several say whether an answer is right."""
    tables: list[Table]


def during_training(runs: Sequence[folders.Run], names: Sequence[str]) -> Table | None:
    """Compares the first with the last evaluation of every run, by part and kind."""
    headings: list[str] = []
    columns: list[list[folders.Row]] = []
    notes: list[str] = []
    for run, name in zip(runs, names, strict=True):
        ends = before_and_after(run)
        if not ends:
            continue
        prefix = f"{name}: " if len(runs) > 1 else ""
        headings.extend(prefix + label for label, _ in ends)
        columns.append([row for _, row in ends])
        if len(ends) == 2:
            headings.append("change")
        notes.append(f"{folders.number(ends[-1][1].get('questions')):.0f}")
    if not columns:
        return None
    everything = {key: None for column in columns for row in column for key in row}
    rows = []
    keys = [k for k in _score_names(everything) if not _is_kind(k, everything) or "accuracy" in k]
    for key in keys:
        cells: list[Cell] = []
        for column in columns:
            cells.extend(_cell(key, row) for row in column)
            if len(column) == 2:
                cells.append(_change(key, *column))
        if len(columns) > 1 and all(len(column) == 2 for column in columns):
            cells.append(_mean_change(key, columns))
        rows.append((_row_name(key, everything), cells))
    if len(columns) > 1 and all(len(column) == 2 for column in columns):
        headings.append("mean change")
    questions = " / ".join(dict.fromkeys(notes))
    return Table(
        title="Validation during training",
        note=f"Greedy answers to {questions} held-out questions; 95 % intervals where known.",
        headings=["", *headings],
        rows=rows,
    )


def before_and_after(run: folders.Run) -> list[tuple[str, folders.Row]]:
    """Returns (label, evaluation): the start or the first, and the last; one if there is one."""
    rows = [(f"step {row['step']}", row) for row in run.evaluations]
    if run.start_evaluation and run.evaluations and run.evaluations[0]["step"] != 0:
        rows.insert(0, ("start", run.start_evaluation))
    return rows if len(rows) < 2 else [rows[0], rows[-1]]


def evaluated(runs: Sequence[folders.Run], names: Sequence[str]) -> list[Evaluated]:
    """Shows every scores.json: intervals of the first part by kind, then a table for each part."""
    found = []
    for run, name in zip(runs, names, strict=True):
        for folder, tree in _in_order(run):
            parts = _parts(_modes(tree))
            if not parts:
                continue
            chart, legend = _chart(tree, parts[0])
            found.append(
                Evaluated(
                    title=f"{name}: {folder}" if len(runs) > 1 else folder,
                    note=_note(tree),
                    chart=chart,
                    legend=legend,
                    overview=_overview(tree, parts),
                    tables=[_mode_table(tree, part) for part in parts],
                )
            )
    return found


def sweeps(
    runs: Sequence[folders.Run], names: Sequence[str], problems: list[str]
) -> list[SweepChart]:
    """Draws every sweep.json: the first accuracy over the number of frames; one that is damaged is
    told in `problems`."""
    charts = []
    for run, name in zip(runs, names, strict=True):
        for folder, tree in run.sweeps.items():
            try:
                chart = sweep_chart(tree)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"{run.folder}/evaluate/{folder}/sweep.json: {error!r}")
                continue
            title = f"{name}: {folder}" if len(runs) > 1 else folder
            charts.append(dataclasses.replace(chart, title=f"{title}: {chart.title}"))
    return charts


def sweep_chart(tree: folders.Row) -> SweepChart:
    """Draws a sweep.json of python -m longrl_jax.evaluate --frames."""
    points = tree["points"]
    lines = list(dict.fromkeys(point["line"] for point in points))
    series = []
    for colour, line in enumerate(lines):
        dots = []
        for point in (point for point in points if point["line"] == line):
            score = point["scores"][point["part"]]
            low, high = (score["mean"] if score[e] is None else score[e] for e in ("low", "high"))
            dots.append(svg.Dot(step=point["frames"], value=score["mean"], low=low, high=high))
        none = np.zeros(0)
        series.append(
            svg.Series(name=line, colour=colour, steps=none, values=none, dots=tuple(dots))
        )
    part, known = points[0]["part"], points[0]["baselines"]
    rules = {heading: known[n]["mean"] for n, heading in BASELINES.items() if n in known}
    blind = ", ".join(f"{heading.lower()} {100 * mean:.1f} %" for heading, mean in rules.items())
    counts = sorted({point["questions"] for point in points})
    asked = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return SweepChart(
        title=part,
        note=f"{asked} questions, greedy; bars: 95 % intervals"
        + (f"; broken: {blind}." if blind else "."),
        svg=svg.dots_chart(
            series, label=f"{part} by frames", x_label="frames", rules=list(rules.values())
        ),
        legend=list(enumerate(lines)) if lines != [""] else [],
    )


def compared(runs: Sequence[folders.Run], names: Sequence[str]) -> Table | None:
    """Puts every scores.json on a line: the first part over all kinds; needs two of them."""
    found = {
        f"{name}: {folder}" if len(runs) > 1 else folder: tree
        for run, name in zip(runs, names, strict=True)
        for folder, tree in _in_order(run)
    }
    tables = {}
    for label, tree in found.items():
        if parts := _parts(_modes(tree)):
            tables[label] = parts[0], _mode_table(tree, parts[0])
    if len(tables) < 2:
        return None
    headings = list(dict.fromkeys(h for _, table in tables.values() for h in table.headings))
    rows = []
    for label, (_, table) in tables.items():
        cells = dict(zip(table.headings[1:], table.rows[0][1], strict=True))
        rows.append((label, [cells.get(heading, Cell(text="")) for heading in headings[1:]]))
    names_of_parts = " / ".join(dict.fromkeys(part for part, _ in tables.values()))
    return Table(title="Evaluations compared", note=names_of_parts, headings=headings, rows=rows)


def gains(runs: Sequence[folders.Run], names: Sequence[str], problems: list[str]) -> list[Table]:
    """Subtracts the score of what a run started from, question by question, by kind.

    Needs evaluations of both checkpoints in the run's folder; why two do not compare is told in
    `problems`.
    """
    tables = []
    for run, name in zip(runs, names, strict=True):
        start = str(run.setting("model.path"))
        before = [n for n, tree in run.scores.items() if tree.get("checkpoint") == start]
        for after in run.scores:
            if not before or after in before:
                continue
            parts = _parts(_modes(run.scores[after]))[:1]
            modes = [m for m in ("greedy", "sampled") if m in run.scores[after]["modes"]]
            folder = run.folder / "evaluate"
            read = _reader(run.scores[after])
            by_mode = {}
            for mode, part in ((mode, part) for mode in modes for part in parts):
                try:
                    by_mode[MODES[mode]] = scores.difference(
                        folder / after, folder / before[0], mode=mode, part=part, read=read
                    )
                except (ValueError, KeyError, TypeError) as error:  # cut off, or other questions
                    problems.append(f"{folder / after} minus {before[0]}, {mode}: {error}")
            if by_mode:
                title = f"{name}: " * (len(runs) > 1) + f"{after} minus {before[0]}"
                tables.append(_gain_table(title, parts[0], by_mode))
    return tables


def is_share(key: str) -> bool:
    """Whether a reward part is a share of answers, to be shown in per cent."""
    return any(word in ("accuracy", "format") for word in key.split("/"))


def _score_names(keys: Any) -> list[str]:
    """Returns the score keys among an evaluation's, every kind after its part."""
    names = [k for k in keys if k not in ("step", "questions", "refused", "seconds")]
    names = [k for k in names if k.rsplit("/", 1)[-1] not in ENDS]

    def place(key: str) -> tuple[int, str]:
        first = next((i for i, part in enumerate(PARTS) if part in key.split("/")), len(PARTS))
        return first, key

    return sorted(names, key=place)


def _row_name(key: str, keys: Any) -> str:
    return " " + key.rpartition("/")[2] if _is_kind(key, keys) else key


def _is_kind(key: str, keys: Any) -> bool:
    return key.rpartition("/")[0] in keys


def _cell(key: str, row: folders.Row) -> Cell:
    ends = {end: folders.number(row.get(f"{key}/{end}")) for end in ENDS}
    return _value_cell(folders.number(row.get(key)), ends["low"], ends["high"], share=is_share(key))


def _value_cell(
    mean: float, low: float, high: float, *, share: bool, count: float = math.nan
) -> Cell:
    if not math.isfinite(mean):
        return Cell(text="")
    notes = []
    if math.isfinite(low) and math.isfinite(high):
        notes.append(
            f"{100 * low:.1f} to {100 * high:.1f}" if share else f"{low:.3f} to {high:.3f}"
        )
    if math.isfinite(count):
        notes.append(f"n={count:.0f}")
    text = f"{100 * mean:.1f} %" if share else f"{mean:.3f}"
    return Cell(text=text, note=", ".join(notes))


def _change(key: str, before: folders.Row, after: folders.Row) -> Cell:
    return _change_cell(key, folders.number(after.get(key)) - folders.number(before.get(key)))


def _mean_change(key: str, columns: Sequence[Sequence[folders.Row]]) -> Cell:
    """Averages the change over runs, seeds as a rule; nothing if one of them lacks it."""
    ends = [[folders.number(row.get(key)) for row in column] for column in columns]
    return _change_cell(key, sum(after - before for before, after in ends) / len(ends))


def _change_cell(key: str, change: float) -> Cell:
    if not math.isfinite(change):
        return Cell(text="")
    text = f"{100 * change:+.1f} pts" if is_share(key) else f"{change:+.3f}"
    return Cell(text=text, mood="up" if change > 0 else "down" if change < 0 else "")


def _in_order(run: folders.Run) -> list[tuple[str, folders.Row]]:
    """Returns the evaluations of a run, that of what it started from first."""
    start = str(run.setting("model.path"))

    def place(item: tuple[str, folders.Row]) -> tuple[bool, list[tuple[int, str]]]:
        words = re.split(r"(\d+)", item[0])  # 8 frames before 16
        return item[1].get("checkpoint") != start, [
            (int(word) if word.isdecimal() else 0, word) for word in words
        ]

    return sorted(run.scores.items(), key=place)


def _modes(tree: folders.Row) -> dict[str, Any]:
    return {mode: by for mode, by in tree["modes"].items() if isinstance(by, dict)}


def _parts(modes: dict[str, Any]) -> list[str]:
    every = {part: None for by in modes.values() for part in (_dict(by.get("all")))}

    def place(part: str) -> tuple[int, str]:
        word = part.rsplit("/", 1)[-1]
        return (PARTS.index(word) if word in PARTS else len(PARTS)), part

    return sorted(every, key=place)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _kinds(modes: dict[str, Any]) -> list[str]:
    """Returns all, the kinds and the values of every tag, in the order of scores.json."""
    every = dict.fromkeys(kind for by in modes.values() for kind in by)
    return sorted(every, key=lambda kind: kind != "all")


def _score(modes: dict[str, Any], mode: str, kind: str, part: str) -> dict[str, float]:
    """Returns mean, low, high and n, nan where scores.json lacks them."""
    score = _dict(_dict(modes[mode].get(kind)).get(part))
    return {name: folders.number(score.get(name)) for name in ("mean", *ENDS)}


def _baselines(tree: folders.Row) -> dict[str, dict[str, folders.Row]]:
    """Returns {heading: {kind: {mean, ...}}} of the baselines that need no model."""
    found = {}
    for name, heading in BASELINES.items():
        by_kind = _dict(_dict(tree.get("baselines")).get(name))
        rows = {kind: row for kind, row in by_kind.items() if isinstance(row, dict)}
        if rows:
            found[heading] = rows
    return found


def _chart(tree: folders.Row, part: str) -> tuple[Markup, list[tuple[int, str]]]:
    modes = _modes(tree)
    baselines = _baselines(tree) if "accuracy" in part else {}
    rows, most = [], 0.5
    for kind in _kinds(modes):
        columns = [_score(modes, mode, kind, part) for mode in modes]
        columns += [
            {"mean": folders.number(b.get(kind, {}).get("mean"))} for b in baselines.values()
        ]
        dots = []
        for colour, score in enumerate(columns):
            if math.isfinite(mean := score["mean"]):
                low, high = (score.get(end, math.nan) for end in ("low", "high"))
                low, high = (mean if math.isnan(end) else end for end in (low, high))
                dots.append((colour, mean, low, high))
        if dots:
            rows.append((kind, dots))
            most = max(most, *(high for _, _, _, high in dots))
    legend = list(enumerate([*(MODES.get(mode, mode) for mode in modes), *baselines]))
    label = f"{part} by kind and mode"
    return svg.interval_chart(rows, label=label, most=min(1.0, most * 1.05)), legend


def _overview(tree: folders.Row, parts: Sequence[str]) -> Table | None:
    """Puts the parts side by side over all kinds, a row a mode; None for a single accuracy."""
    if sum(scores.is_right(part) for part in parts) < 2:
        return None
    modes = _modes(tree)
    shown = [part for part in parts if "@" not in part]
    rows = []
    for mode in modes:
        found = [_score(modes, mode, "all", part) for part in shown]
        cells = [
            _value_cell(score["mean"], score["low"], score["high"], share=is_share(part))
            for part, score in zip(shown, found, strict=True)
        ]
        rows.append((MODES.get(mode, mode), cells))
    for heading, by_kind in _baselines(tree).items():
        mean = folders.number(by_kind.get("all", {}).get("mean"))
        cell = _value_cell(mean, math.nan, math.nan, share=True)
        rows.append((heading, [cell if scores.is_right(part) else Cell(text="") for part in shown]))
    return Table(title="All questions", headings=["", *shown], rows=rows)


def _mode_table(tree: folders.Row, part: str) -> Table:
    modes = _modes(tree)
    baselines = _baselines(tree) if "accuracy" in part.split("/")[-1] else {}
    share = is_share(part)
    rows = []
    for kind in _kinds(modes):
        cells: list[Cell] = []
        first = math.nan
        for mode in modes:
            score = _score(modes, mode, kind, part)
            n = math.nan if score["n"] == first else score["n"]  # once a row is enough
            first = score["n"] if math.isnan(first) else first
            ends = score["low"], score["high"]
            cells.append(_value_cell(score["mean"], *ends, share=share, count=n))
        for by_kind in baselines.values():
            row = by_kind.get(kind, {})
            cell = _value_cell(folders.number(row.get("mean")), math.nan, math.nan, share=share)
            note = f"always {row['letter']}" if "letter" in row else ""
            cells.append(dataclasses.replace(cell, note=note))
        rows.append((kind if kind == "all" else f" {kind}", cells))
    headings = ["", *(MODES.get(mode, mode) for mode in modes), *baselines]
    return Table(title=part, headings=headings, rows=rows)


def _reader(tree: folders.Row) -> Callable[[Path | str, str], dict[str, list[scores.Row]]] | None:
    """Returns what reads the answers of an evaluation, as its scores count them."""
    if not (name := tree.get("benchmark")):
        return None
    from longrl_jax import benchmarks  # here: it brings rewards, which take seconds

    return functools.partial(benchmarks.read_answers, benchmark=name)


def _gain_table(title: str, part: str, by_mode: dict[str, dict[str, scores.Score]]) -> Table:
    kinds = dict.fromkeys(kind for by_kind in by_mode.values() for kind in by_kind)
    rows = []
    for kind in kinds:
        cells = []
        for by_kind in by_mode.values():
            score = {key: folders.number(v) for key, v in by_kind.get(kind, {}).items()}
            cell = _change_cell(part, score.get("mean", math.nan))
            low, high = (100 * score.get(end, math.nan) for end in ("low", "high"))
            note = f"{low:+.1f} to {high:+.1f}" if math.isfinite(low + high) else ""
            if low <= 0 <= high:  # may be chance: no colour
                cell = dataclasses.replace(cell, mood="")
            cells.append(dataclasses.replace(cell, note=note if is_share(part) else ""))
        rows.append((kind if kind == "all" else f" {kind}", cells))
    return Table(title=title, note=part, headings=["", *by_mode], rows=rows)


def _note(tree: folders.Row) -> str:
    words = [f"Checkpoint {tree.get('checkpoint', '?')}"]
    if tree.get("step") is not None:
        words.append(f"step {tree['step']}")
    words.append(f"{tree.get('questions', '?')} questions")
    if tree.get("refused"):
        words.append(f"{tree['refused']} refused")
    sentences = [", ".join(words), "Bars: 95 % intervals"]
    if tree.get("complete") is False:
        sentences.insert(1, "Unfinished: the same command goes on")
    for part, score in _dict(tree.get("shuffled_minus_greedy")).items():
        mean, low, high = (
            100 * folders.number(_dict(score).get(key)) for key in ("mean", "low", "high")
        )
        said = f"{part}, options shuffled minus greedy on the same questions: {mean:+.1f} pts"
        sentences.append(said + (f" ({low:+.0f} to {high:+.0f})" if low < high else ""))
    sentences += [f"No {mode}: {why}" for mode, why in _dict(tree.get("skipped")).items()]
    return ". ".join(sentences) + "."
